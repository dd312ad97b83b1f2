"""
A Hub on this machine: the HTTP calls that huggingface_hub makes to create, fill, read and list repositories of models.

It keeps everything in memory, knows branches, pull requests, tokens and private repositories, serves ranges, and can be
told to fail: to break connections off, to be slow, to forget how ranges work.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_local"
OWNER = "tester"
LFS_SUFFIXES = (".safetensors", ".pth", ".bin", ".png", ".gif")
CHUNK = 2**16


@dataclass(frozen=True)
class Blob:
    """A file: its content, and whether it is kept beside git, by its SHA-256."""

    content: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_hash(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_hash


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    files: dict[str, Blob]
    title: str
    parent: str | None = None

    @property
    def sha(self) -> str:
        names = [(name, blob.sha256) for name, blob in sorted(self.files.items())]
        return hashlib.sha1(json.dumps([names, self.title, self.parent]).encode()).hexdigest()


@dataclass
class Repository:
    """Branches, each a list of commits, the newest last."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit({}, "initial")]})

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for branch in self.branches.values() for commit in branch)
        return next((commit for commit in commits if commit.sha == revision), None)


@dataclass
class Faults:
    """
    What goes wrong.

    Attributes:
        break_after: the connections of the next downloads that are longer end after so many bytes, one entry each.
        bytes_per_second: of every download.
        without_ranges: answer with the whole file whatever was asked.
        corrupt: the next downloads have one bit changed, one entry each.
        statuses: answer the next calls with these errors.
        before: called with method and path before every answer.
    """

    break_after: list[int] = field(default_factory=list)
    bytes_per_second: float | None = None
    without_ranges: bool = False
    corrupt: list[bool] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    before: Callable[[str, str], None] | None = None


@dataclass(frozen=True)
class Call:
    """A request that was answered."""

    method: str
    path: str
    range: str | None
    has_token: bool
    status: int


class LocalHub:
    """
    The server. It listens from the start and answers after `start()`.

    Attributes:
        endpoint: its address, for `HF_ENDPOINT`.
        store: where large files are, under another name of the host, as the Hub keeps them elsewhere.
        repositories: by name.
        large: contents by SHA-256.
        part_size: larger files are uploaded in parts of so many bytes.
        calls: all requests so far.
        sent: bytes of files sent so far.
    """

    def __init__(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.store = f"http://localhost:{self.server.server_address[1]}/lfs"
        self.is_running = False
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_size: int | None = None
        self.calls: list[Call] = []
        self.sent = 0
        self.faults = Faults()
        self.lock = threading.RLock()

    def start(self) -> None:
        if not self.is_running:
            self.is_running = True
            threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Commit:
        """Puts a repository there, without the client."""
        repository = self.repositories.setdefault(repo_id, Repository(private))
        blobs = {name: Blob(content, is_large(name, content)) for name, content in files.items()}
        self.large |= {blob.sha256: blob.content for blob in blobs.values() if blob.is_large}
        newest = repository.branches["main"][-1]
        repository.branches["main"].append(Commit({**newest.files, **blobs}, "files", newest.sha))
        return repository.branches["main"][-1]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        commit = self.repositories[repo_id].at(revision)
        assert commit is not None, f"{repo_id} has no {revision}"
        return {name: blob.content for name, blob in commit.files.items()}

    def requests(self, method: str, pattern: str) -> list[Call]:
        """The calls with a method whose path holds a pattern."""
        return [call for call in self.calls if call.method == method and re.search(pattern, call.path)]


def is_large(name: str, content: bytes) -> bool:
    return name.endswith(LFS_SUFFIXES) or len(content) > 10_000_000


class _RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {**({"X-Error-Code": code} if code else {}), **headers}
        if message:
            self.headers["X-Error-Message"] = message


NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", rf"/api/models/{NAME}/refs", "refs"),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(/.*)?", "tree"),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{NAME}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", rf"/api/models/{NAME}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"/api/models/{NAME}(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w{64})/(?P<part>\d+)", "lfs_part"),
    ("POST", r"/lfs/(?P<oid>\w{64})/complete", "lfs_complete"),
    ("POST", r"/lfs/(?P<oid>\w{64})/verify", "lfs_verify"),
    ("GET", r"/lfs/(?P<oid>\w{64})", "lfs_get"),
    ("PUT", r"/lfs/(?P<oid>\w{64})", "lfs_put"),
    ("HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal of the tests."""

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True

    def __getattr__(self, name: str) -> Any:
        """The base class looks for `do_GET` and so on."""
        if not name.startswith("do_"):
            raise AttributeError(name)
        return self.dispatch

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.faults.before is not None:
            self.hub.faults.before(self.command, url.path)
        try:
            if self.hub.faults.statuses:
                raise _RefusedError(self.hub.faults.statuses.pop(0), message="out of order")
            for method, pattern, name in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if method == self.command and found:
                    getattr(self, name)(**{k: unquote(v) for k, v in found.groupdict().items() if v})
                    return
            raise _RefusedError(404, message=f"no route {self.command} {url.path}")
        except _RefusedError as error:
            self.answer(error.status, {"error": str(error)}, error.headers)

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        """A JSON answer."""
        body = b"" if content is None else json.dumps(content).encode()
        self.send(status, {"Content-Type": "application/json", **(headers or {})}, body)

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        with self.hub.lock:
            has_token = "Authorization" in self.headers
            path = urlsplit(self.path).path
            self.hub.calls.append(Call(self.command, path, self.headers.get("Range"), has_token, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who asks, and for what

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_writer(self) -> None:
        if not self.is_known():
            raise _RefusedError(401, message="Invalid username or password.")

    def repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self.is_known()):
            raise _RefusedError(404 if self.is_known() else 401, "RepoNotFound", "Repository not found")
        return found

    def commit_at(self, repo: str, revision: str) -> Commit:
        found = self.repository(repo).at(revision)
        if found is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def whoami(self) -> None:
        self.check_writer()
        self.answer(200, {"name": OWNER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    # Repositories

    def create(self) -> None:
        self.check_writer()
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if asked.get("organization") not in (None, OWNER):
            raise _RefusedError(403, message=f"You have no rights in {asked['organization']}")
        content = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}
        with self.hub.lock:
            if repo in self.hub.repositories:
                self.answer(409, {"error": "You already created this model repo", **content})
                return
            is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[repo] = Repository(is_private)
        self.answer(200, content)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        has_data = content.startswith("---\n") and "\n---\n" in content
        errors = [] if has_data else [{"message": "no metadata"}]
        self.answer(200 if has_data else 400, {"errors": errors, "warnings": []})

    def branch(self, repo: str, branch: str) -> None:
        self.check_writer()
        with self.hub.lock:
            branches = self.repository(repo).branches
            if branch in branches:
                raise _RefusedError(409, message="Reference already exists")
            branches[branch] = list(branches["main"])
        self.answer(200, {})

    def info(self, repo: str, revision: str = "main") -> None:
        commit = self.commit_at(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        private = self.repository(repo).private
        self.answer(
            200,
            {
                "id": repo,
                "modelId": repo,
                "sha": commit.sha,
                "private": private,
                "siblings": siblings,
                "tags": [],
            },
        )

    def refs(self, repo: str) -> None:
        branches = self.repository(repo).branches
        listed = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].sha}
            for name, commits in branches.items()
        ]
        self.answer(200, {"branches": listed, "tags": [], "converts": []})

    def entries(self, commit: Commit, names: list[str]) -> list[dict[str, Any]]:
        found = []
        for name in names:
            blob = commit.files[name]
            entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.git_hash}
            if blob.is_large:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
            found.append(entry)
        return found

    def tree(self, repo: str, revision: str) -> None:
        commit = self.commit_at(repo, revision)
        self.answer(200, self.entries(commit, sorted(commit.files)))

    def paths_info(self, repo: str, revision: str) -> None:
        commit = self.commit_at(repo, revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        self.answer(200, self.entries(commit, [name for name in asked if name in commit.files]))

    # Uploads

    def preupload(self, repo: str, revision: str) -> None:
        self.check_writer()
        commit = self.commit_at(repo, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            sample = base64.b64decode(file["sample"])
            is_lfs = is_large(file["path"], sample) or file["size"] > 10_000_000
            blob = commit.files.get(file["path"])
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": blob.etag if blob else None,
                }
            )
        self.answer(200, {"files": files, "commitOid": commit.sha})

    def lfs_batch(self, repo: str) -> None:
        self.check_writer()
        self.repository(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            found: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                place = f"{self.hub.store}/{asked['oid']}"
                upload: dict[str, Any] = {"href": place}
                if self.hub.part_size is not None and asked["size"] > self.hub.part_size:
                    count = -(-asked["size"] // self.hub.part_size)
                    urls = {str(part): f"{place}/{part}" for part in range(1, count + 1)}
                    upload = {
                        "href": f"{place}/complete",
                        "header": {"chunk_size": str(self.hub.part_size), **urls},
                    }
                found["actions"] = {"upload": upload, "verify": {"href": f"{place}/verify"}}
            objects.append(found)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise _RefusedError(400, message="content does not match its name")
        with self.hub.lock:
            self.hub.large[oid] = content

    def lfs_put(self, oid: str) -> None:
        self.keep(oid, self.body)
        self.answer(200)

    def lfs_part(self, oid: str, part: str) -> None:
        with self.hub.lock:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        self.answer(200, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        listed = [(part["partNumber"], part["etag"].strip('"')) for part in json.loads(self.body)["parts"]]
        if listed != [(number, hashlib.md5(parts[number]).hexdigest()) for number in sorted(parts)]:
            raise _RefusedError(400, message="parts are missing")
        self.keep(oid, b"".join(parts[number] for number in sorted(parts)))
        self.answer(200)

    def lfs_verify(self, oid: str) -> None:
        if oid not in self.hub.large:
            raise _RefusedError(404, message="not uploaded")
        self.answer(200)

    def commit(self, repo: str, revision: str) -> None:
        self.check_writer()
        with self.hub.lock:
            parent = self.commit_at(repo, revision)
            files, title = dict(parent.files), ""
            for line in self.body.splitlines():
                operation = json.loads(line)
                key, value = operation["key"], operation["value"]
                if key == "header":
                    title = value["summary"]
                elif key == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.large:
                        raise _RefusedError(400, message=f"{value['path']} was not uploaded")
                    files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise _RefusedError(404, "EntryNotFound", "A file with this name doesn't exist")
                else:
                    raise _RefusedError(400, message=f"unknown operation {key}")
            new = Commit(files, title, parent.sha)
            branches = self.repository(repo).branches
            content = {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{new.sha}", "commitOid": new.sha}
            if self.query.get("create_pr"):
                number = 1 + sum(name.startswith("refs/pr/") for name in branches)
                branches[f"refs/pr/{number}"] = [*branches[revision], new]
                content["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{number}"
            else:
                branches[revision].append(new)
        self.answer(200, content)

    # Downloads

    def resolve(self, repo: str, revision: str, file: str) -> None:
        commit = self.commit_at(repo, revision)
        blob = commit.files.get(file)
        if blob is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.sha})
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.is_large:
            headers |= {
                "X-Linked-Etag": f'"{blob.sha256}"',
                "X-Linked-Size": str(len(blob.content)),
                "Location": f"{self.hub.store}/{blob.sha256}",
            }
            self.send(302, headers)
        elif self.command == "HEAD":
            self.send(200, {**headers, "Content-Length": str(len(blob.content))})
        else:
            self.stream(blob.content, headers)

    def lfs_get(self, oid: str) -> None:
        self.stream(self.hub.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def stream(self, content: bytes, headers: dict[str, str]) -> None:
        """Sends a file, or the range of it that was asked for, with the faults that are due."""
        faults, size = self.hub.faults, len(content)
        start, stop, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked and not faults.without_ranges:
            start = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
            stop = min(int(asked[2]) + 1, size) if asked[1] and asked[2] else size
            status = 206
            if start >= size:
                raise _RefusedError(416, **{"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        body = bytearray(content[start:stop])
        if faults.corrupt and faults.corrupt.pop(0):
            body[len(body) // 2] ^= 1
        is_long = faults.break_after and len(body) > faults.break_after[0]
        breaks = faults.break_after.pop(0) if is_long else None
        self.send(status, {**headers, "Content-Length": str(len(body))})
        for place in range(0, len(body), CHUNK):
            piece = body[place : place + CHUNK]
            if breaks is not None and place + len(piece) > breaks:
                self.wfile.write(piece[: breaks - place])
                self.hub.sent += breaks - place
                self.close_connection = True
                self.wfile.flush()
                self.connection.close()
                return
            self.wfile.write(piece)
            self.hub.sent += len(piece)
            if faults.bytes_per_second:
                time.sleep(len(piece) / faults.bytes_per_second)
