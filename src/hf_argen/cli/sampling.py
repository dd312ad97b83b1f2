"""`argen sample`: many pictures, by any number of processes, for metrics such as FID."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import typer

from .crew import Crew, crew
from .files import FORMATS, check_out
from .generating import check_kind, draw_batch
from .opening import fingerprint, open_pipeline
from .progress import progress, warnings_as_notes
from .request import MAX_PICTURES, MAX_SEED, DrawRequest
from .stores import ArrayStore, FolderStore, Store

SUFFIX = ".npz"


@dataclass
class SampleRequest(DrawRequest):
    """
    What `argen sample` was asked for: any number of pictures, of which each has a seed of its own.

    Args:
        batch: pictures that are drawn together.
    """

    batch: int = 16

    most_pictures = None
    example = "argen sample 'red apple' -o samples"

    def check(self) -> None:
        super().check()
        if not 1 <= self.batch <= MAX_PICTURES:
            raise ValueError(f"--batch is {self.batch}; it must lie in [1, {MAX_PICTURES}].")
        assert self.seed is not None
        if self.seed > MAX_SEED - len(self.all_pictures):
            raise ValueError(
                f"--seed is {self.seed}; with {len(self.all_pictures)} more it must stay below 2^63."
            )

    @cached_property
    def all_pictures(self) -> list[tuple[str, int]]:
        """(prompt or class, seed) of each picture; the pictures of one condition stand together."""
        assert self.seed is not None
        texts = [text for text in self.prompts or self.classes for _ in range(self.count)]
        return [(text, self.seed + index) for index, text in enumerate(texts)]

    def pictures(self) -> list[tuple[str, int]]:
        return self.all_pictures

    def one(self, index: int) -> DrawRequest:  # type: ignore[override]
        """The request of `argen generate` for one of the pictures."""
        text, seed = self.all_pictures[index]
        start = index - index % self.batch
        together = [list(one) for one in self.all_pictures[start : start + self.batch]]
        options = {one.name: getattr(self, one.name) for one in dataclasses.fields(DrawRequest)}
        options |= {"prompts": [text] if self.prompts else [], "classes": [text] if self.classes else []}
        company = {"pictures": together, "index": index - start} if len(together) > 1 else None
        return DrawRequest(**{**options, "count": 1, "seed": seed, "company": company})

    def plan(self) -> dict[str, Any]:
        """All that the pictures depend on, plain JSON; the conditions, which may be many, by number and digest."""
        plan = self.record()
        for name in ("prompt", "class"):
            plan.pop(name, None)
        texts = self.prompts or self.classes
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        kind = "prompts" if self.prompts else "classes"
        return {**plan, "conditions": f"{len(texts)} {kind}, sha256 {digest}", "count": self.count}


def sample_command(
    request: SampleRequest,
    out: Path,
    conditions: Path | None = None,
    all_classes: bool = False,
    force: bool = False,
) -> None:
    """
    Draws the pictures that are not there yet, together with the other processes of this run.

    A batch is always made of the same pictures and drawn by one process, so that neither the number of processes nor
    an interruption changes a picture.

    Args:
        request: what to draw; picture i of all has its seed + i.
        out: `NAME.npz`, or a folder of PNGs.
        conditions: a file with one prompt or class a line, in place of those of `request`.
        all_classes: all classes of the model, in place of those of `request`.
        force: begin anew where the output holds another run.

    Raises:
        ValueError: bad input.
    """
    start = time.perf_counter()
    out = out.expanduser()
    with crew(request.device) as processes, warnings_as_notes():
        _check(request, out, conditions, all_classes)
        lines = None if conditions is None else read_conditions(conditions)
        draw = open_pipeline(request.model, request.dtype, request.quantize, processes.device)
        request = _completed(request, draw, lines, all_classes)
        store_class = ArrayStore if out.suffix.lower() == SUFFIX else FolderStore
        store = store_class(out, request.plan(), len(request.pictures()), request.batch)
        if processes.is_first:
            if force:
                store.clear()
            store.begin()
        missing = processes.from_first(store.missing() if processes.is_first else None)
        _draw(draw, request, store, missing, processes)
        processes.wait()
        if processes.is_first:
            store.finish()
            _report(out, request, len(missing), time.perf_counter() - start)


def _check(request: SampleRequest, out: Path, conditions: Path | None, all_classes: bool) -> None:
    """Refuses what can be refused before the model is opened."""
    given = [bool(request.prompts or request.classes), conditions is not None, all_classes]
    if sum(given) != 1:
        raise ValueError("Give what to draw in one way: prompts, --class, --list or --all-classes.")
    if given[0]:
        request.check()
    if out.suffix.lower() in FORMATS:
        raise ValueError(f"{out} has the suffix of one picture; give NAME.npz, or a folder for PNGs.")
    check_out(out, is_folder=out.suffix.lower() != SUFFIX)


def read_conditions(path: Path) -> list[str]:
    """
    The lines of a file, empty ones left out.

    Raises:
        ValueError: it cannot be read or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--list {path} cannot be read ({getattr(error, 'strerror', error)}).") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"--list {path} is empty; write one prompt or class a line.")
    return found


def _completed(
    request: SampleRequest, draw: Any, lines: Sequence[str] | None, all_classes: bool
) -> SampleRequest:
    """The request with its conditions, checked, and with what the model fills in."""
    is_text = draw.condition_type == "text"
    if all_classes:
        if is_text:
            raise ValueError(
                "This model draws prompts and has no classes; give --list with one prompt a line."
            )
        lines = [str(label) for label in range(draw.model.config.num_classes)]
    if lines is not None:
        which = {"prompts": list(lines)} if is_text else {"classes": list(lines)}
        request = dataclasses.replace(request, **which)
        request.check()
    check_kind(request, draw.condition_type)
    draw.check(request.prompts or request.classes)
    return request.resolved(draw.model, fingerprint(request.model, draw.model.config))


def _draw(draw: Any, request: SampleRequest, store: Store, missing: Sequence[int], processes: Crew) -> None:
    """Draws and writes the share of this process."""
    pictures, batches = request.pictures(), store.batches()
    own = missing[processes.rank :: processes.size]
    with progress(sum(len(batches[number]) for number in own), is_shown=processes.is_first) as advance:
        for number in own:
            drawn = draw_batch(draw, request, [pictures[index] for index in batches[number]])
            store.write(number, drawn, [request.one(index).record() for index in batches[number]])
            advance(len(drawn))


def _report(out: Path, request: SampleRequest, drawn: int, seconds: float) -> None:
    assert request.seed is not None
    count = len(request.pictures())
    seeds = f"seeds {request.seed} to {request.seed + count - 1}" if count > 1 else f"seed {request.seed}"
    new = "" if drawn else ", all there already"
    typer.echo(f"{out}: {'1 picture' if count == 1 else f'{count} pictures'}, {seeds}{new}, {seconds:.1f} s")
