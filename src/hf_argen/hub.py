"""What we ask of the Hub: a file that continues where it broke off, and a folder in one commit."""

import hashlib
import os
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from .storage import stale_weights

# The base of all errors of the HTTP library, which is another one in each major version of huggingface_hub.
HTTPError = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
SHA256_DIGITS = 64  # an etag of this length is the check sum of the file
CARD = "README.md"
# What a folder may hold that is no part of a model: states of training, and pickles, which nobody should open.
NOT_PUSHED = ("checkpoint-*", "runs", "*.bin", "*.pt", "*.pth", "*.pkl", "*.lock", "*.part", "__pycache__")


class PushError(ValueError):
    """A folder that cannot be pushed; the message says why and what to do."""


def fetch_file(repository: str, file: str, **options: Any) -> str:
    """
    The path of a file of a Hub repository in the cache, as [`~huggingface_hub.hf_hub_download`] gives it.

    A large file goes on where an earlier download broke off, whatever ended it, and is compared with its check sum.
    (huggingface_hub continues within one call only.)

    Args:
        options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

    Raises:
        OSError, ValueError: what huggingface_hub raises; the connection broke off; the file is not what the
            repository says it is.
    """
    if not (options.get("local_files_only") or options.get("force_download") or is_offline_mode()):
        _fetch_large(repository, file, **options)
    return hf_hub_download(repository, file, **options)


def _fetch_large(
    repository: str,
    file: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    **_: Any,
) -> None:
    """Puts a file with a check sum among the blobs of the cache; leaves everything else to huggingface_hub."""
    url = hf_hub_url(repository, file, revision=revision)
    try:
        metadata = get_hf_file_metadata(url, token=token)
    except (HTTPError, OSError, ValueError):  # hf_hub_download meets the same and knows what to say
        return
    etag, size = metadata.etag, metadata.size
    if etag is None or len(etag) != SHA256_DIGITS or not size or size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return
    cache, folder = Path(cache_dir or constants.HF_HUB_CACHE), f"models--{repository.replace('/', '--')}"
    blob, lock = cache / folder / "blobs" / etag, cache / ".locks" / folder / f"{etag}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            part = blob.with_name(f"{etag}.part")
            _continue(part, url, size, file, token)
            if _sha256(part) != etag:
                part.unlink()
                raise OSError(f"{file} of {repository} arrived damaged; fetch it again.")
            part.replace(blob)


def _continue(part: Path, url: str, size: int, name: str, token: str | bool | None) -> None:
    """Fetches what `part` lacks of the `size` bytes at `url`."""
    with part.open("ab") as target:
        if target.tell() > size:
            target.truncate(0)
        try:
            http_get(
                url,
                target,
                resume_size=target.tell(),
                headers=build_hf_headers(token=token),
                expected_size=size,
                displayed_filename=name,
            )
        except (HTTPError, OSError) as error:
            target.flush()
            raise OSError(
                f"{name} broke off after {part.stat().st_size:,} of {size:,} bytes ({error}); run it again to continue"
            ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    card: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Pushes the files of a folder in one commit, so that the repository is never half of one model and half of another.
    Weights that these files replace (more shards, or fewer) are deleted in the same commit.

    Args:
        folder: what to push; hidden files, states of training and pickles stay behind.
        repo_id: repository; made if there is none.
        card: text of the model card, in place of the one in the folder.
        private, revision, commit_message, commit_description, token, create_pr: as in
            [`~huggingface_hub.HfApi.create_commit`] and `create_repo`; a branch `revision` is made if there is none.

    Raises:
        PushError: the Hub refuses, or cannot be reached.
    """
    api = HfApi(token=token, library_name="hf_argen")
    names = files_to_push(folder)
    files: dict[str, Path | bytes] = {name: Path(folder) / name for name in names}
    if card is not None:
        files[CARD] = card.encode()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = api.list_repo_files(repo_id, revision=revision)
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(stale_weights(present, names))]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except (HTTPError, OSError, HFValidationError) as error:
        raise PushError(_reason(repo_id, error)) from error


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """Names, relative to `folder`, of the files that belong to a model."""
    folder = Path(folder)
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if not any(part.startswith(".") or _is_left_behind(part) for part in path.parts)
    ]


def _is_left_behind(part: str) -> bool:
    return any(Path(part).match(pattern) for pattern in NOT_PUSHED)


def text_in(
    repo_id: str, name: str, revision: str | None = None, token: str | bool | None = None
) -> str | None:
    """The text of a file that a repository has; `None` without file or repository."""
    try:
        path = hf_hub_download(repo_id, name, revision=revision, token=token)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None
    return Path(path).read_text(encoding="utf-8")


def _reason(repo_id: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"The Hub does not let you write to {repo_id} ({status}); log in with 'hf auth login', or set HF_TOKEN to "
            "a token that may write."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{repo_id} cannot be pushed: {' '.join(lines[:2])}"
