"""Writing pictures whole or not at all, and the record in them from which they can be drawn again."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..storage import temporary_name, write_whole

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
RECORD = "argen"  # name of the entry
EXIF_DESCRIPTION = 0x010E
MAX_NAME = 40
MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "GIF": 65_535}  # in pixels
MAX_PIXELS = 89_000_000  # above it PIL takes a picture for an attack and does not open it
MAX_ANIMATED_PIXELS = 30_000_000
MAX_JPEG_RECORD = 65_000  # in bytes


def check_out(out: Path, is_folder: bool) -> None:
    """
    Finds out before any work whether `out` can be written; makes the folder, if it is one, but not its parents.

    Raises:
        ValueError: it cannot.
    """
    try:
        _check_place(out, is_folder)
        probe = (out if is_folder and out.exists() else out.parent) / f".{os.getpid()}.part"
        probe.touch()
        probe.unlink()
        if not is_folder:
            with contextlib.suppress(FileNotFoundError):
                temporary_name(out).stat()
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}); give another output.") from error


def _check_place(out: Path, is_folder: bool) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"The folder {out.parent} does not exist; make it first, or give another output.")
    if not is_folder and out.is_dir():
        raise ValueError(f"{out} is a folder; give a file, or a name without suffix for a folder of PNGs.")
    if is_folder and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file without suffix; give one of {', '.join(FORMATS)}, or a folder.")


def check_sheet(path: Path, size: tuple[int, int], record: dict[str, Any], is_animated: bool) -> None:
    """
    Finds out before any work whether a sheet of `size` (width, height) with its record fits its format.

    Raises:
        ValueError: it does not.
    """
    image_format = FORMATS[path.suffix.lower()]
    width, height = size
    pixels = MAX_ANIMATED_PIXELS if is_animated else MAX_PIXELS
    if max(size) > MAX_SIDE.get(image_format, pixels) or width * height > pixels:
        kind = f"an animated {path.suffix}" if is_animated else f"a {path.suffix}"
        raise ValueError(
            f"A sheet of {width}x{height} pixels is too large for {kind} file; draw fewer pictures, or give a name "
            "without suffix for a folder of PNGs."
        )
    if image_format == "JPEG" and len(json.dumps(record)) > MAX_JPEG_RECORD:
        raise ValueError(f"{path} cannot hold so many prompts in its record; give a .png file.")


def write_picture(path: Path, picture: Image.Image, record: dict[str, Any]) -> None:
    """Writes a picture in the format of its suffix, with its record."""
    image_format = FORMATS[path.suffix.lower()]
    text = json.dumps(record, ensure_ascii=False)
    options: dict[str, Any] = {}
    if image_format == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("Software", f"hf_argen {record['version']}")
        for name, value in record.items():
            if name != "version" and not isinstance(value, dict):
                info.add_itxt(name, "; ".join(value) if isinstance(value, list) else str(value))
        info.add_itxt(RECORD, text)
        options["pnginfo"] = info
    elif image_format != "GIF":
        exif = Image.Exif()
        exif[EXIF_DESCRIPTION] = json.dumps(record)
        options |= {"exif": exif, "quality": 95}
    write_whole(path, lambda temporary: picture.save(temporary, format=image_format, **options))


def write_animation(path: Path, frames: Sequence[Image.Image], record: dict[str, Any]) -> None:
    """Writes a GIF that shows each frame for a moment and the last one for longer, over and over."""
    durations = [300] * (len(frames) - 1) + [1800]
    first, *rest = (frame.quantize(256, dither=Image.Dither.NONE) for frame in frames)
    comment = json.dumps(record).encode()

    def save(temporary: Path) -> None:
        first.save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=rest,
            duration=durations,
            loop=0,
            comment=comment,
        )

    write_whole(path, save)


def read_record(path: Path) -> dict[str, Any]:
    """
    The record of a picture that `argen generate` wrote.

    Raises:
        ValueError: no picture, or one without record.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            text = picture.info.get(RECORD) or picture.getexif().get(EXIF_DESCRIPTION)
            text = text or picture.info.get("comment")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read.") from error
    record = None
    with contextlib.suppress(ValueError, TypeError):
        record = json.loads(text)
    if not isinstance(record, dict) or "version" not in record:
        raise ValueError(f"{path} holds no record of how it was made; argen generate writes one.")
    return record


def slug(text: str) -> str:
    """A file name from a prompt."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:MAX_NAME].strip("-") or "picture"


def file_names(texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """One name of a PNG per picture, no two alike."""
    seen: dict[str, int] = {}

    def names() -> Iterator[str]:
        for text, seed in zip(texts, seeds, strict=True):
            name = f"{slug(text)}-{seed}"
            seen[name] = seen.get(name, 0) + 1
            yield f"{name}.png" if seen[name] == 1 else f"{name}-{seen[name]}.png"

    return list(names())


def free_name(name: str, suffix: str) -> Path:
    """`name` and suffix in the present folder, with a number behind it where the file exists."""
    path, number = Path(name + suffix), 1
    while path.exists():
        number += 1
        path = Path(f"{name}-{number}{suffix}")
    return path
