"""What safetensors files say about themselves, read without trusting them and without reading the weights."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER = 25_000_000  # bytes; that of a hundred thousand tensors has half of it
MAX_JSON = 64_000_000  # bytes of a JSON file; an index of a hundred thousand tensors is smaller
MAX_DIMENSIONS = 64
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = {
    "F64": 64,
    "F32": 32,
    "C64": 64,
    "BOOL": 8,
    **dict.fromkeys(("F16", "BF16"), 16),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
    **{f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)},
}


class DamagedFileError(ValueError):
    """A file that cannot be read as what it claims to be; the message lacks only its subject, the file."""


@dataclass(frozen=True)
class TensorHeader:
    """Dtype, in the names of safetensors, and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers that can be weights as they stand."""
        return self.dtype in FLOATS

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: str | Path) -> dict[str, TensorHeader]:
    """
    The tensors of a safetensors file by name.

    Raises:
        DamagedFileError: the file is truncated or no safetensors file, or its header contradicts itself or the size
            of the file; memory in use is bounded by the size of the file and by `MAX_HEADER`.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise DamagedFileError("is truncated or not a safetensors file")
        content = file.read(length)
    entries = _parse(content, "its header")
    entries.pop("__metadata__", None)
    headers, ranges = {}, []
    for name, entry in entries.items():
        headers[name], place = _tensor(name, entry)
        ranges.append(place)
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            raise DamagedFileError("has tensors that overlap or leave gaps")
        end = stop
    if end != size - 8 - length:
        raise DamagedFileError("is truncated or not a safetensors file: its weights are cut off")
    return headers


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorHeader]:
    """
    The tensors of all files of a checkpoint.

    Raises:
        DamagedFileError: see [`read_header`], or a tensor is in two files; the message begins with the file's name.
    """
    headers: dict[str, TensorHeader] = {}
    for file in map(Path, files):
        try:
            found = read_header(file)
        except DamagedFileError as error:
            raise DamagedFileError(f"{file.name} {error}") from error
        if twice := sorted(headers.keys() & found.keys()):
            raise DamagedFileError(f"{file.name} holds {twice[0]}, which another file holds too")
        headers |= found
    return headers


def read_index(path: str | Path) -> list[str]:
    """
    The names of the files that an index of shards lists.

    Raises:
        DamagedFileError: it is no index, or a name leads out of its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise DamagedFileError("is damaged: it has no weight_map of names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise DamagedFileError(f"names {name!r}, which is not in its folder")
    return names


def read_json(path: str | Path) -> dict[str, Any]:
    """
    A JSON object from a file.

    Raises:
        DamagedFileError: it is none, is too large, or has a key twice.
    """
    path = Path(path)
    if path.stat().st_size > MAX_JSON:
        raise DamagedFileError(f"has {path.stat().st_size} bytes, too many for what it should be")
    return _parse(path.read_bytes(), "it")


def _parse(content: bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedFileError(f"is damaged: {what} is not JSON") from error
    if not isinstance(parsed, dict):
        raise DamagedFileError(f"is damaged: {what} is no JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        (twice, _) = Counter(name for name, _ in pairs).most_common(1)[0]
        raise DamagedFileError(f"has the key {twice} twice")
    return entries


def _tensor(name: str, entry: Any) -> tuple[TensorHeader, tuple[int, int]]:
    """One entry of a header, and the bytes that its tensor takes."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"is damaged: the entry of {name} is incomplete") from error
    numbers = [*shape, start, stop]
    if (
        not isinstance(dtype, str)
        or dtype not in BITS
        or len(shape) > MAX_DIMENSIONS
        or not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    ):
        raise DamagedFileError(f"is damaged: {name} has a dtype or shape that there is not")
    if 8 * (stop - start) != math.prod(shape) * BITS[dtype]:
        raise DamagedFileError(f"has {name} with a shape that its bytes do not fill")
    return TensorHeader(dtype, shape), (start, stop)
