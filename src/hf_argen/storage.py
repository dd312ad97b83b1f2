"""
Folders and files that are whole or not there, whenever the process that writes them dies.

Everything is written beside its place first and moved there by renaming. A process that is killed leaves a folder
behind whose name tells which process made it; the next one to write to the same place clears it away.
"""

import glob
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEYS = (
    "config.json",
    "adapter_config.json",
    "processor_config.json",
)  # without its key a folder does not load
WEIGHTS = re.compile(r"(?P<stem>[\w-]+?)(\.(?P<variant>[\w.-]+?))?(-\d{5}-of-\d{5})?\.safetensors")
INDEX = re.compile(r"(?P<stem>[\w-]+?)\.safetensors\.index(\.(?P<variant>[\w.-]+?))?\.json")
MARK = re.compile(r"\.(?P<name>.+)\.(?P<state>new|old)-(?P<host>\w+)-(?P<process>\d+)-(?P<token>\w+)")
INSIDE = "hf_argen"  # what is written inside of the folder that it becomes a part of
PROCESS = secrets.token_hex(4)  # tells a process from an earlier one with the same number


@contextmanager
def merged_folder(target: str | os.PathLike) -> Iterator[Path]:
    """
    An empty folder to write to; when the block ends without error, its files become files of `target`.

    Files of `target` with other names stay, except for weights of the same variant, which would be loaded in place of
    or together with the new ones. If the process dies before the block ends, `target` is as it was; if it dies while
    files are moved, `target` has no `config.json` and cannot be loaded.

    Raises:
        ValueError: `target` is a file.
    """
    target = _checked(target)
    clear_remains(target)
    fresh = _marked(target / INSIDE if target.exists() else target, "new")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        _merge(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def replaced_folder(target: str | os.PathLike) -> Iterator[Path]:
    """
    An empty folder to write to; when the block ends without error, it takes the place of `target`.

    Raises:
        ValueError: `target` is a file.
    """
    target = _checked(target)
    clear_remains(target)
    fresh, old = _marked(target, "new"), _marked(target, "old")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """
    Calls `save` with a temporary path and renames the result, so that `path` is complete or absent.

    Raises:
        ValueError: it cannot be written.
    """
    temporary = temporary_name(path)
    try:
        save(temporary)
        temporary.replace(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}); nothing was left."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Where a file is written before it is renamed: beside `path`, not seen by others."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def remove_parts(folder: Path) -> None:
    """Removes the files that killed processes were writing in a folder with `write_whole`."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def clear_remains(target: str | os.PathLike) -> None:
    """
    Clears away what processes that died left of their work on `target`; a folder that was moved aside and not yet
    replaced comes back.
    """
    target = Path(target).resolve()
    for parent, name in ((target.parent, target.name), (target, INSIDE)):
        for folder in list(parent.glob(f".{glob.escape(name)}.*")):
            found = MARK.fullmatch(folder.name)
            if found is None or (found["name"], found["host"]) != (name, _host()):
                continue
            if _is_alive(int(found["process"]), found["token"]):
                continue
            if found["state"] == "old" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def final_name(folder: str | os.PathLike) -> str:
    """The name of a folder, or that of its later place while it is being written."""
    folder = Path(folder).resolve()
    if (found := MARK.fullmatch(folder.name)) is None:
        return folder.name
    return found["name"] if found["name"] != INSIDE else final_name(folder.parent)


def stale_weights(present: Iterable[str], written: Iterable[str]) -> set[str]:
    """
    Names of the weight files among `present` that belong to the same weights and variant as some among `written`, but
    to an earlier form of them: more shards, fewer, or a single file.

    >>> stale_weights(["model.safetensors", "model.bf16.safetensors"], ["model-00001-of-00002.safetensors"])
    {'model.safetensors'}
    """
    written = set(written)
    renewed = {kind for name in written if (kind := _kind_of_weights(name)) is not None}
    return {name for name in present if name not in written and _kind_of_weights(name) in renewed}


def check_links(folder: str | os.PathLike) -> None:
    """
    Refuses a folder in which a link leads out of it, which could make a file of the user's pass for one of the model.
    Folders of the Hub's cache are made of links to the blobs beside them, and these are followed.

    Raises:
        ValueError: names the link.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        # <cache>/models--owner--name/snapshots/<commit>; a blob may itself be a link to a store of the whole cache.
        repository = folder.resolve().parents[1]
        roots += [repository / "blobs", repository.parent / "blobs"]
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise ValueError(
                f"{path.name} in {str(folder)!r} is a link that leads out of the folder, to {os.readlink(path)}; "
                "put the file itself there if you trust it."
            )


def _kind_of_weights(name: str) -> tuple[str, str | None] | None:
    """What weights a file is a part of, and of which variant; `None` for other files."""
    found = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
    return (found["stem"], found["variant"]) if found else None


def _merge(fresh: Path, target: Path) -> None:
    files = [path.relative_to(fresh) for path in sorted(fresh.rglob("*")) if not path.is_dir()]
    if not files:  # a process of several that writes nothing
        return
    if not target.exists():
        fresh.rename(target)
        return
    keys = [Path(key) for key in KEYS if Path(key) in files]
    present = [path.name for path in target.iterdir()]
    # From here to the last line the folder cannot be loaded.
    for name in [*map(str, keys), *stale_weights(present, map(str, files))]:
        (target / name).unlink(missing_ok=True)
    for file in [*(file for file in files if file not in keys), *reversed(keys)]:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (fresh / file).replace(target / file)


def _checked(target: str | os.PathLike) -> Path:
    # Resolved, since a link may lead to another disk, where renaming from here would not work.
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder.")
    return target


def _marked(target: Path, state: str) -> Path:
    """A folder beside `target` that belongs to this process."""
    return target.with_name(f".{target.name}.{state}-{_host()}-{os.getpid()}-{PROCESS}")


def _host() -> str:
    """This machine, among several that share a disk."""
    return re.sub(r"\W+", "_", socket.gethostname())


def _is_alive(process: int, token: str) -> bool:
    if process == os.getpid():  # in a container an earlier process may well have had our number
        return token == PROCESS
    if os.name != "posix":  # asking may end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
