"""
Checkpoints that are damaged or made to harm, from good ones.

A case is a function that changes a folder or file in place; `FOLDERS` holds those of folders that `save_pretrained`
wrote, `ARCHIVES` those of files that `torch.save` wrote.
"""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


def assert_refused(load: Callable[[], Any]) -> str:
    """`load` raises a ValueError in one line; returns its message."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  what it says differs
        load()
    message = str(caught.value)
    assert message.endswith((".", ")")) and "\n" not in message and len(message) < 600, message
    return message


def loaded_or_refused(load: Callable[[], Any]) -> Any:
    """What `load` gives; `None` where it raises a ValueError in one line."""
    try:
        return load()
    except ValueError as error:
        message = str(error)
    assert "\n" not in message, message
    return None


@contextmanager
def context(name: str) -> Iterator[None]:
    """Names the case in what fails inside."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


class Runs:
    """Leaves a mark when a pickle with it is opened by an unpickler that runs code."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def some_matrix(weights: dict[str, torch.Tensor]) -> str:
    """The name of a matrix, or of a convolution where there is none."""
    floats = {key: tensor for key, tensor in weights.items() if tensor.is_floating_point()}
    return min((key for key in floats if floats[key].ndim >= 2), key=lambda key: floats[key].ndim)


def header_of(path: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and its weights."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: str, weights: bytes) -> None:
    encoded = header.encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + weights)


# Folders


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def cut_to(length: Callable[[int, int], int]) -> Callable[[Path], None]:
    """Truncates the weights to `length(bytes of the header, bytes of the file)`."""

    def case(folder: Path) -> None:
        path = weights_of(folder)
        content = path.read_bytes()
        header = 8 + struct.unpack("<Q", content[:8])[0]
        path.write_bytes(content[: length(header, len(content))])

    return case


def stored_as(dtype: torch.dtype) -> Callable[[Path], None]:
    """Stores one of the matrices in another dtype."""

    def case(folder: Path) -> None:
        weights = load_file(weights_of(folder))
        key = some_matrix(weights)
        weights[key] = weights[key].to(dtype)
        save_file(weights, weights_of(folder), {"format": "pt"})

    return case


def key_twice(folder: Path) -> None:
    header, weights = header_of(weights_of(folder))
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    write_header(
        weights_of(folder), text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}", weights
    )


def key_of_config_twice(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "model_type": "other"}')


def key_in_two_shards(folder: Path) -> None:
    weights = load_file(weights_of(folder))
    names = sorted(weights)
    half = len(names) // 2
    parts = {"a.safetensors": names[: half + 1], "b.safetensors": names[half:]}
    for file, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights_of(folder).unlink()


def index_beside_weights(folder: Path) -> None:
    """As a killed saving of transformers leaves it: an index of other shards, and one file."""
    names = [name for name in header_of(weights_of(folder))[0] if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leads_out(folder: Path) -> None:
    save_file(load_file(weights_of(folder)), folder.parent / "outside.safetensors", {"format": "pt"})
    names = [name for name in header_of(weights_of(folder))[0] if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights_of(folder).unlink()


def link_out(name: str) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        outside.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(outside)

    return case


def pickle_with_code(name: str) -> Callable[[Path], None]:
    """A pickle in place of the weights; opened carelessly, it makes the file `was_run` beside the folder."""

    def case(folder: Path) -> None:
        weights = load_file(weights_of(folder))
        weights_of(folder).unlink()
        torch.save({**weights, "more": Runs(folder.parent / "was_run")}, folder / name)

    return case


def bomb_as(name: str) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        weights_of(folder).unlink()
        write_bomb(folder / name)

    return case


def header_says(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        header, weights = header_of(weights_of(folder))
        change(header)
        write_header(weights_of(folder), json.dumps(header), weights)

    return case


def first_tensor(header: dict) -> dict:
    return header[next(name for name in header if name != "__metadata__")]


def length_of_header(length: int) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        content = weights_of(folder).read_bytes()
        weights_of(folder).write_bytes(struct.pack("<Q", length) + content[8:])

    return case


def config_says(**fields: Any) -> Callable[[Path], None]:
    def case(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return case


def config_is(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_bytes(content) and None


FOLDERS: dict[str, Callable[[Path], None]] = {
    "empty": cut_to(lambda header, size: 0),
    "cut in the length": cut_to(lambda header, size: 5),
    "cut before the header": cut_to(lambda header, size: 8),
    "cut in the header": cut_to(lambda header, size: header // 2),
    "cut after the header": cut_to(lambda header, size: header),
    "last byte missing": cut_to(lambda header, size: size - 1),
    "stored as int64": stored_as(torch.int64),
    "stored as bool": stored_as(torch.bool),
    "stored as float8": stored_as(torch.float8_e4m3fn),
    "stored as complex": stored_as(torch.complex64),
    "key twice": key_twice,
    "key of config.json twice": key_of_config_twice,
    "key in two shards": key_in_two_shards,
    "index beside weights": index_beside_weights,
    "index that leads out": index_that_leads_out,
    "weights are a link out": link_out("model.safetensors"),
    "config.json is a link out": link_out("config.json"),
    "pickle with code": pickle_with_code("pytorch_model.bin"),
    "pickle with code, renamed": pickle_with_code("model.safetensors"),
    "zip bomb": bomb_as("pytorch_model.bin"),
    "zip bomb, renamed": bomb_as("model.safetensors"),
    "endless header": length_of_header(2**62),
    "header beyond the file": length_of_header(2**24),
    "offsets beyond the file": header_says(lambda h: first_tensor(h).update(data_offsets=[0, 2**60])),
    "negative offsets": header_says(lambda h: first_tensor(h).update(data_offsets=[-8, 0])),
    "shape of terabytes": header_says(lambda h: first_tensor(h).update(shape=[2**20, 2**20])),
    "unknown dtype": header_says(lambda h: first_tensor(h).update(dtype="F33")),
    "no dtype": header_says(lambda h: first_tensor(h).pop("dtype")),
    "config.json cut": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text()[:40]
    ),
    "config.json is no text": config_is(bytes(range(256))),
    "config.json nested without end": config_is(b"[" * 100_000),
}


def flipped_headers(folder: Path, count: int, seed: int = 0) -> Iterator[None]:
    """Flips a bit of the header of the weights, another one each time."""
    content = weights_of(folder).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    draw = random.Random(seed)
    for _ in range(count):
        yield from _flipped(weights_of(folder), content, draw.randrange(header), draw.randrange(8))


def _flipped(path: Path, content: bytes, place: int, bit: int) -> Iterator[None]:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    yield


# Files of torch.save


def write_bomb(path: Path, size: int = 2**31) -> None:
    """An archive of torch.save's layout whose pickle unpacks to `size` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("w/data.pkl", "w", force_zip64=True) as record:
            block = bytes(2**20)
            for _ in range(size // len(block)):
                record.write(block)
        archive.writestr("w/version", "3\n")


def repacked(
    change: Callable[[str, bytes], bytes] | None = None, twice: str | None = None, packed: bool = False
):
    """Writes an archive anew, with changed records, one of them twice, or packed."""

    def case(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
        kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, content in records:
                archive.writestr(name, content if change is None else change(name, content))
                if twice is not None and name.endswith(twice):
                    archive.writestr(name, content)

    return case


def weights_with(change: Callable[[dict], None], **options: Any) -> Callable[[Path], None]:
    def case(path: Path) -> None:
        weights = torch.load(path, weights_only=True)
        change(weights)
        torch.save(weights, path, **options)

    return case


def spread_over_nothing(weights: dict) -> None:
    """A tensor of terabytes that takes four bytes."""
    key = some_matrix(weights)
    weights[key] = torch.zeros(1).expand(2**20, 2**20)


def shared_by_many(weights: dict) -> None:
    block = torch.zeros(2**20)
    weights.update({f"more.{number}.weight": block.view(2**10, 2**10) for number in range(10**4)})


def without_numbers(weights: dict) -> None:
    key = next(iter(weights))
    weights[key] = torch.empty(2**30, 2**10, device="meta")


def with_code(path: Path) -> None:
    weights = torch.load(path, weights_only=True)
    torch.save({**weights, "more": Runs(path.parent / "was_run")}, path)


def with_code_legacy(path: Path) -> None:
    weights = torch.load(path, weights_only=True)
    options = {"_use_new_zipfile_serialization": False}
    torch.save({**weights, "more": Runs(path.parent / "was_run")}, path, **options)


def code_alone(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(path.parent / "was_run")))


def size_says(numbers: int) -> Callable[[Path], None]:
    """A pickle that asks for a storage of so many numbers, in the older form of torch.save."""

    def case(path: Path) -> None:
        torch.save({"a": torch.zeros(2**10)}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        asked = content.replace(b"M\x00\x04", b"\x8a\x08" + struct.pack("<q", numbers), 1)
        assert asked != content
        path.write_bytes(asked)

    return case


def reduces_to(function: str, argument: str) -> Callable[[Path], None]:
    """A pickle that calls a function on a large number."""

    def case(path: Path) -> None:
        code = f"c{function}\n(I{argument}\ntR.".encode()
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(1)}, buffer)
        buffer.seek(0)
        with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(path, "w") as out:
            for info in archive.infolist():
                content = b"\x80\x02" + code if info.filename.endswith("data.pkl") else archive.read(info)
                out.writestr(info.filename, content)

    return case


def archive_cut_to(part: float) -> Callable[[Path], None]:
    def case(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])

    return case


def to_int8(weights: dict) -> None:
    key = some_matrix(weights)
    weights[key] = weights[key].to(torch.int8)


def to_float8(weights: dict) -> None:
    key = some_matrix(weights)
    weights[key] = weights[key].to(torch.float8_e4m3fn)


ARCHIVES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "four bytes": archive_cut_to(1e-5),
    "cut in the middle": archive_cut_to(0.5),
    "cut at the end": archive_cut_to(0.999),
    "stored as int8": weights_with(to_int8),
    "stored as float8": weights_with(to_float8),
    "no numbers": weights_with(without_numbers),
    "terabytes in four bytes": weights_with(spread_over_nothing),
    "terabytes in four bytes, older form": weights_with(
        spread_over_nothing, _use_new_zipfile_serialization=False
    ),
    "one block ten thousand times": weights_with(shared_by_many),
    "record twice": repacked(twice="data.pkl"),
    "records packed": repacked(packed=True),
    "pickle of terabytes": lambda path: write_bomb(path),
    "bytes of the pickle changed": lambda path: flip_in(path, b"data.pkl", 100),
    "bytes of a weight changed": lambda path: flip_in(path, b"data/0", 100),
    "pickle with code": with_code,
    "pickle with code, older form": with_code_legacy,
    "code alone": code_alone,
    "storage beyond the file": size_says(2**50),
    "bytes without end": reduces_to("builtins\nbytearray", str(2**45)),
    "storage without end": reduces_to("torch.storage\nUntypedStorage", str(2**45)),
}


def flip_in(path: Path, name: bytes, offset: int) -> None:
    """Changes a byte of a record of an archive."""
    content = bytearray(path.read_bytes())
    content[content.index(name) + offset] ^= 0x40
    path.write_bytes(content)


def flipped_archives(path: Path, count: int, seed: int = 0) -> Iterator[None]:
    """Flips a bit of what is not weights in an archive of torch.save: its pickle, its directory, the names."""
    content = path.read_bytes()
    draw = random.Random(seed)
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        places: list[int] = list(range(archive.start_dir, len(content)))
    for info in infos:
        end = info.header_offset + (len(info.FileHeader()) if "/data/" in info.filename else 400)
        places += range(info.header_offset, min(end, archive.start_dir))
    for _ in range(count):
        yield from _flipped(path, content, draw.choice(places), draw.randrange(8))
