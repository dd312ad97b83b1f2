"""
Where the pictures of a sampling run go: a folder of PNGs, or the `.npz` that FID tools read.

Pictures are written batch by batch, each file whole or not at all, beside a plan that says what the run is. A run that
was killed is gone on with by giving the same command again.
"""

import glob
import json
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..storage import remove_parts, write_whole
from .files import write_picture

PLAN = "sample.json"
RECORD = "argen"  # entry of the .npz that holds the plan
DIGITS = 6


class Store(ABC):
    """
    Keeps what a run has drawn so far.

    Args:
        out: what the user named.
        plan: all that the pictures depend on, plain JSON; a run with another one is refused.
        count: pictures of the run.
        batch: pictures that are drawn and written together.
    """

    def __init__(self, out: Path, plan: dict[str, Any], count: int, batch: int):
        self.out, self.plan, self.count, self.batch = out, plan, count, batch

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Where files are while the run lasts."""

    @abstractmethod
    def missing(self) -> list[int]:
        """The batches that have still to be drawn, by number."""

    @abstractmethod
    def write(self, number: int, pictures: Sequence[Image.Image], records: Sequence[dict[str, Any]]) -> None:
        """Keeps a batch; `records` tell how each picture was made."""

    @abstractmethod
    def finish(self) -> None:
        """Brings a run of which nothing is missing into its final form."""

    @abstractmethod
    def clear(self) -> None:
        """Removes what an earlier run has left."""

    def begin(self) -> None:
        """
        Makes the folder and writes the plan, or compares it with that of the run that is gone on with.

        Raises:
            ValueError: the output holds something else, or another run.
        """
        known = self.known_plan()
        if known is None:
            found = self.folder.iterdir() if self.folder.exists() else ()
            if any(not path.name.endswith(".part") for path in found):
                raise ValueError(f"{self.folder} is not empty; give another output.")
            self.folder.mkdir(exist_ok=True)
            text = json.dumps(self.plan, ensure_ascii=False, indent=1)
            write_whole(self.folder / PLAN, lambda path: path.write_text(text, encoding="utf-8"))
            return
        for name in self.plan | known:
            own, other = self.plan.get(name), known.get(name)
            if own != other:
                raise ValueError(
                    f"{self.out} was begun with {name} {shown(other)}, not {shown(own)}; give the same options to go "
                    "on, --force to begin anew, or another output."
                )

    def known_plan(self) -> dict[str, Any] | None:
        """The plan of the run that the output holds, `None` if there is none."""
        path = self.folder / PLAN
        return read_plan(path.read_text(encoding="utf-8"), path) if path.is_file() else None

    def batches(self) -> list[range]:
        """The pictures of each batch, by number."""
        return [
            range(start, min(start + self.batch, self.count)) for start in range(0, self.count, self.batch)
        ]

    def remove_leftovers(self) -> None:
        """Files that killed processes were writing."""
        remove_parts(self.folder)


class FolderStore(Store):
    """`OUT/000000.png` and so on, in the order of the request; every picture holds its record."""

    @property
    def folder(self) -> Path:
        return self.out

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self.out / f"{index:0{DIGITS}d}.png"

    def missing(self) -> list[int]:
        present = {path.name for path in self.out.glob("*.png")}
        return [
            number
            for number, batch in enumerate(self.batches())
            if any(self.path(index).name not in present for index in batch)
        ]

    def write(self, number: int, pictures: Sequence[Image.Image], records: Sequence[dict[str, Any]]) -> None:
        for index, picture, record in zip(self.batches()[number], pictures, records, strict=True):
            if not self.path(index).exists():
                write_picture(self.path(index), picture, record)

    def finish(self) -> None:
        self.remove_leftovers()

    def clear(self) -> None:
        if self.known_plan() is None:
            return
        for path in self.out.glob("*.png"):
            if re.fullmatch(rf"\d{{{DIGITS},}}\.png", path.name):
                path.unlink()
        self.remove_leftovers()
        (self.out / PLAN).unlink()


class ArrayStore(Store):
    """
    A `.npz` whose `arr_0` is (pictures, height, width, 3) uint8, in the order of the request, and whose entry `argen`
    is the plan as JSON. Until the run is complete, its batches lie in the folder `OUT.parts`.
    """

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parts")

    def path(self, number: int) -> Path:
        """The file of a batch."""
        return self.folder / f"{number:0{DIGITS}d}.npy"

    def known_plan(self) -> dict[str, Any] | None:
        if not self.out.exists():
            return super().known_plan()
        try:
            with np.load(self.out) as arrays:
                return read_plan(arrays[RECORD].item(), self.out)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.out} exists and is not of argen sample; give another output.") from error

    def missing(self) -> list[int]:
        if self.out.exists():
            return []
        return [number for number in range(len(self.batches())) if not self.path(number).is_file()]

    def write(self, number: int, pictures: Sequence[Image.Image], records: Sequence[dict[str, Any]]) -> None:
        batch = np.stack([np.asarray(picture) for picture in pictures])
        write_whole(self.path(number), save_to(lambda stream: np.save(stream, batch)))

    def finish(self) -> None:
        if not self.out.exists():
            write_whole(self.out, self._join)
        self._remove_parts()
        for path in self.out.parent.glob(f".{glob.escape(self.out.name)}.*.part"):
            path.unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        """The plan goes last: a folder without it would be taken for somebody else's."""
        if self.folder.exists():
            for path in self.folder.glob("*.npy"):
                path.unlink()
            self.remove_leftovers()
            (self.folder / PLAN).unlink(missing_ok=True)
            self.folder.rmdir()

    def _join(self, path: Path) -> None:
        """Writes the array part by part, since all pictures together may not fit into memory."""
        numbers = range(len(self.batches()))
        shape = (self.count, *np.load(self.path(0), mmap_mode="r").shape[1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for number in numbers:
                    stream.write(np.load(self.path(number)).tobytes())
            with archive.open(f"{RECORD}.npy", "w") as stream:
                np.lib.format.write_array(stream, np.array(json.dumps(self.plan, ensure_ascii=False)))

    def clear(self) -> None:
        if self.known_plan() is not None:
            self.out.unlink(missing_ok=True)
            self._remove_parts()


def save_to(save: Callable[[Any], None]) -> Callable[[Path], None]:
    """`save`, which takes a stream, as a function of a path; numpy would add a suffix to a path."""

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            save(stream)

    return write


def read_plan(text: str, path: Path) -> dict[str, Any]:
    """
    A plan from its JSON.

    Raises:
        ValueError: it is damaged.
    """
    try:
        plan = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The plan in {path} is no JSON ({error}); give another output.") from error
    if not isinstance(plan, dict):
        raise ValueError(f"The plan in {path} is none; give another output.")
    return plan


def shown(value: Any) -> str:
    """A value of a plan, short enough for a message."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
