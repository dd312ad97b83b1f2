"""Reading the authors' checkpoint files: tensors and plain values only, never code."""

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_NAME

from ..storage import check_links
from .headers import DamagedFileError, read_header, read_headers, read_index

MAX_PICKLE = 2**26  # bytes; that of a model of ten thousand tensors is a fiftieth of it
MAX_SHARING = 8  # how many times the size of its file the tensors may have, where several share their memory


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message names the file or key and says what to do."""


def read_checkpoint(path: str | Path, role: str, allowed_globals: Sequence[Callable] = ()) -> dict[str, Any]:
    """
    Reads one file, or a folder of safetensors files, as the authors wrote it.

    Args:
        path: `.safetensors` file, file written by `torch.save`, or folder with a safetensors index.
        role: what the file is for, named in errors.
        allowed_globals: classes that a pickle may hold besides tensors and plain values.

    Returns:
        The content, nested as in the file. Tensors of a `torch.save` archive are mapped from disk, not
        copied.

    Raises:
        ConversionError: missing, truncated, damaged, not a checkpoint, a pickle that holds code (which is never
            run), an archive that unpacks to more than it is.
    """
    path = Path(path)
    what = f"The {role} file {str(path)!r}"
    if not path.exists():
        raise ConversionError(f"{what} does not exist; check the path.")
    if path.is_dir():
        return _read_folder(path, role)
    if path.stat().st_size == 0:
        raise ConversionError(f"{what} is empty; fetch it again.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, what)
    content = _read_pickle(path, what, allowed_globals)
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"{what} holds a {type(content).__name__}, not a dict of tensors; give the file that holds the "
            "state dict."
        )
    return dict(content)


def tensors_at(content: Mapping, path: Sequence[str], role: str, file: str | Path) -> dict[str, torch.Tensor]:
    """The state dict that lies at `path` (names of entries, none for the top) in the content of a file."""
    what = f"The {role} file {str(file)!r}"
    for depth, name in enumerate(path):
        if not isinstance(content, Mapping) or name not in content:
            raise ConversionError(
                f"{what} has no entry {' -> '.join(path[: depth + 1])}; {_entries(content)}."
            )
        content = content[name]
    strange = [str(k) for k, v in content.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if strange or not content:
        raise ConversionError(
            f"{what} is not a plain dict of tensors; {_entries(content)}. Give the file that holds the "
            "weights alone, or give this one in the role that reads nested checkpoints."
        )
    _check_extent(content, what, file)
    return dict(content)


def _entries(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"there is a {type(content).__name__} in that place"
    names = [str(name) for name in content]
    if not names:
        return "it is empty"
    return f"its entries are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"


def _check_extent(tensors: Mapping[str, torch.Tensor], what: str, file: str | Path) -> None:
    """Refuses tensors that are not what they take on disk, and would fill the memory when they are copied."""
    total = 0
    for key, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ConversionError(f"{what} has {key} in another form than a plain tensor; save it as one.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConversionError(
                f"{what} says that {key} has the shape {tuple(tensor.shape)}, but holds fewer numbers; it is damaged."
            )
        total += tensor.numel() * tensor.element_size()
    path = Path(file)
    size = path.stat().st_size if path.is_file() else total
    if total > MAX_SHARING * size:
        raise ConversionError(
            f"{what} has {size:,} bytes, but its tensors {total:,}; it is damaged or made to fill the memory."
        )


def _read_folder(folder: Path, role: str) -> dict[str, torch.Tensor]:
    try:
        check_links(folder)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.name == SAFE_WEIGHTS_NAME] or files  # others may lie beside it
    if len(indexes) == 1:
        try:
            files = [folder / name for name in read_index(indexes[0])]
        except DamagedFileError as error:
            raise ConversionError(
                f"The index {str(indexes[0])!r} of the {role} {error}; fetch it again."
            ) from error
    elif indexes or len(files) != 1:
        raise ConversionError(
            f"The {role} folder {str(folder)!r} holds {len(indexes)} safetensors indexes and {len(files)} "
            "safetensors files; give a folder with one of either, or the path of the file."
        )
    for file in files:
        if not file.exists():
            raise ConversionError(
                f"The {role} file {str(file)!r} does not exist, but the index names it; fetch it."
            )
    try:
        read_headers(files)
    except DamagedFileError as error:
        raise ConversionError(f"In the {role} folder {str(folder)!r} {error}; fetch it again.") from error
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= _read_safetensors(file, f"The {role} file {str(file)!r}")
    return tensors


def _read_safetensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    try:
        read_header(path)
        return load_file(path)
    except DamagedFileError as error:
        raise ConversionError(f"{what} {error}; fetch it again.") from error
    except SafetensorError as error:
        raise ConversionError(
            f"{what} is truncated or not a safetensors file ({error}); fetch it again."
        ) from error


def _read_pickle(path: Path, what: str, allowed_globals: Sequence[Callable]) -> Any:
    try:
        is_archive = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise ConversionError(f"{what} is damaged ({error}); fetch it again.") from error
    with path.open("rb") as file:
        starts_as_archive = file.read(2) == b"PK"
    if starts_as_archive and not is_archive:
        raise ConversionError(f"{what} is truncated: its end is missing; fetch it again.")
    if is_archive:
        _check_archive(path, what)
    try:
        with torch.serialization.safe_globals(list(allowed_globals)):
            # Only the archive format of torch.save can be mapped; older files are read into memory.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise ConversionError(
                f"{what} is a pickle that holds code ({code.group(1)}), and nothing of it was run; save its "
                "weights as a plain dict of tensors where you trust the file."
            ) from error
        raise ConversionError(
            f"{what} is not a checkpoint written by torch.save, or it is damaged."
        ) from error
    except EOFError as error:
        raise ConversionError(f"{what} is truncated; fetch it again.") from error
    except (
        *(RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError),
        *(MemoryError, OverflowError, AssertionError, struct.error),
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(
            f"{what} is damaged or not a checkpoint written by torch.save ({reason}); fetch it again."
        ) from error


def _check_archive(path: Path, what: str) -> None:
    """
    Refuses an archive that torch.save would not write: packed records (a file of kilobytes can unpack to terabytes),
    records that overlap or have one name, a pickle larger than any list of tensors; and one whose bytes have changed
    since it was written, where it has check sums.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_records(archive.infolist(), path.stat().st_size, what)
            for record in archive.infolist():
                if record.CRC:  # 0 where torch.save was told to write none
                    with archive.open(record) as content:
                        while content.read(2**20):
                            pass
    except (
        *(zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, OverflowError),
        *(UnicodeDecodeError, struct.error),
    ) as error:
        raise ConversionError(f"{what} is damaged ({error}); fetch it again.") from error


def _check_records(records: Sequence[zipfile.ZipInfo], size: int, what: str) -> None:
    names, end = set(), 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise ConversionError(
                f"{what} is an archive with packed records, which torch.save never writes and which can unpack to any "
                "size; it was not unpacked."
            )
        if record.filename in names:
            raise ConversionError(f"{what} holds the record {record.filename} twice; fetch it again.")
        if record.header_offset < end or record.header_offset + record.file_size > size:
            raise ConversionError(f"{what} holds records that overlap; fetch it again.")
        if record.filename.endswith(".pkl") and record.file_size > MAX_PICKLE:
            raise ConversionError(
                f"{what} holds a pickle of {record.file_size:,} bytes, larger than any list of tensors; it was not "
                "opened."
            )
        names.add(record.filename)
        end = record.header_offset + record.file_size
