"""`argen generate`."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from PIL import Image
from transformers.generation import BaseStreamer

from .files import (
    FORMATS,
    check_out,
    check_sheet,
    file_names,
    free_name,
    read_record,
    slug,
    write_animation,
    write_picture,
)
from .opening import fingerprint, open_pipeline
from .progress import progress, warnings_as_notes
from .request import DrawRequest
from .sheets import columns_for, contact_sheet, enlarged, sheet_size

EXAMPLE = {"text": "argen generate 'red apple'", "class": "argen generate --class volcano"}


class Interrupted(typer.Abort):
    """Ctrl-C, with what is left of the work."""


@dataclass
class Target:
    """Where the pictures go: a file (one picture, or a sheet of several), a folder of PNGs, or a GIF alone."""

    out: Path
    is_folder: bool
    animate: bool

    @property
    def picture(self) -> Path | None:
        """The file of the picture or sheet, if there is one."""
        return None if self.is_folder or self.out.suffix.lower() == ".gif" else self.out

    @property
    def animation(self) -> Path | None:
        """The file of the one animation, if there is one."""
        return self.out.with_suffix(".gif") if self.animate and not self.is_folder else None


@dataclass
class Drawn:
    """The pictures so far, and with `--animate` their states after every step."""

    pictures: list[Image.Image] = field(default_factory=list)
    states: list[list[Image.Image]] = field(default_factory=list)


class StateStreamer(BaseStreamer):
    """Keeps what the pictures of one batch look like after every step."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def put(self, value: Any) -> None:
        self.steps.append(value.float().cpu())

    def end(self) -> None:
        """Nothing is held back."""


def generate_command(request: DrawRequest, out: str | None, animate: bool = False) -> None:
    """
    Draws and writes; files appear whole or not at all.

    Args:
        request: what to draw.
        out: a file, or without suffix a folder of PNGs; default: a new PNG in the present folder.
        animate: also (or for `.gif`: only) a GIF of the pictures as they form.

    Raises:
        ValueError: bad input.
        Interrupted: Ctrl-C.
    """
    start = time.perf_counter()
    request.check()
    target = _target(request, out, animate)
    drawn = Drawn()
    try:
        with warnings_as_notes():
            draw = open_pipeline(request.model, request.dtype, request.quantize, request.device)
            request = _fitted(request, draw, target)
            names = file_names(*zip(*request.pictures(), strict=True))
            with progress(len(request.pictures())) as advance:
                for batch in _draw(draw, request, target.animate):
                    if target.is_folder:
                        _write_batch(target.out, names, request, batch, drawn)
                    else:
                        drawn.pictures += batch.pictures
                        drawn.states += batch.states
                    advance(len(batch.pictures))
            if not target.is_folder:
                _write_sheet(target, request, drawn)
    except KeyboardInterrupt as error:
        count = len(drawn.pictures) if target.is_folder else 0
        kept = f"; {_counted(count)} {'is' if count == 1 else 'are'} in {target.out}" if count else ""
        raise Interrupted(f"interrupted{kept}") from error
    _report(target, request, len(drawn.pictures), time.perf_counter() - start)


def again(picture: Path) -> DrawRequest:
    """The request behind a picture."""
    if not picture.is_file():
        raise ValueError(f"{picture} does not exist; give a picture that argen generate wrote.")
    return DrawRequest.from_record(read_record(picture))


def _target(request: DrawRequest, out: str | None, animate: bool) -> Target:
    """Decides and checks where things go, before any work."""
    if out is None:
        path, is_folder = free_name(slug((request.prompts or request.classes)[0]), ".png"), False
    elif not out.strip() or out in FORMATS:
        raise ValueError(f"-o is {out!r}; give the name of a file or folder.")
    else:
        path = Path(out).expanduser()
        suffix = path.suffix.lower()
        is_folder = not suffix or out.endswith(os.sep) or (suffix not in FORMATS and os.path.isdir(path))
        if not is_folder and suffix not in FORMATS:
            raise ValueError(
                f"{out} has an unknown suffix; give one of {', '.join(FORMATS)}, or none for a folder."
            )
    target = Target(path, is_folder, animate or path.suffix.lower() == ".gif")
    check_out(path, is_folder)
    if target.animation is not None:
        check_out(target.animation, False)
    return target


def _fitted(request: DrawRequest, draw: Any, target: Target) -> DrawRequest:
    """The request with what the model fills in, once all that can be known before drawing is checked."""
    check_kind(request, draw.condition_type)
    weights = fingerprint(request.model, draw.model.config)
    if request.weights not in (None, weights):
        raise ValueError(
            f"{request.model} is not the model that drew the picture: its weights are others. Name the one to draw "
            "with: --model"
        )
    request = request.resolved(draw.model, weights)
    draw.check(request.prompts or request.classes)
    count = len(request.pictures())
    for path in filter(None, (target.picture, target.animation)):
        height, width = draw.processor.image_size
        size = (width, height) if count == 1 else sheet_size(count, _columns(request), (width, height))
        check_sheet(path, size, request.record(), path == target.animation)
    return request


def check_kind(request: DrawRequest, kind: str) -> None:
    """Refuses prompts for a model that draws classes, and the other way round."""
    if (kind == "text") != bool(request.prompts):
        what = "prompts, not classes" if kind == "text" else "classes, not prompts"
        raise ValueError(f"This model draws {what}, as in: {EXAMPLE[kind]}")


def _draw(draw: Any, request: DrawRequest, with_states: bool) -> Iterator[Drawn]:
    """Batches of pictures, each with a generator of its own: what chance does depends on its seed alone."""
    for batch, wanted in request.batches():
        streamer = StateStreamer() if with_states else None
        pictures = draw_batch(draw, request, batch, streamer)
        steps = [draw.processor.postprocess(step) for step in streamer.steps] if streamer else []
        yield Drawn(
            pictures=[pictures[i] for i in wanted],
            states=[[step[i] for step in steps] or [pictures[i]] for i in wanted],
        )


def draw_batch(
    draw: Any, request: DrawRequest, batch: Sequence[tuple[str, int]], streamer: BaseStreamer | None = None
) -> list[Image.Image]:
    """One picture for each (prompt or class, seed), all at once."""
    import torch

    results = draw(
        [text for text, _ in batch],
        generator=[torch.Generator(draw.model.input_device).manual_seed(seed) for _, seed in batch],
        streamer=streamer,
        batch_size=len(batch),
        **{**request.options(), "do_sample": True},  # without chance a seed would mean nothing
    )
    return [result["image"] for result in results]


def _write_batch(
    folder: Path, names: Sequence[str], request: DrawRequest, batch: Drawn, written: Drawn
) -> None:
    """Files of one batch, each whole as soon as it is there; `written` keeps count."""
    folder.mkdir(exist_ok=True)
    for picture, states in zip(batch.pictures, batch.states, strict=True):
        index = len(written.pictures)
        path = folder / names[index]
        record = request.one(index).record()
        write_picture(path, picture, record)
        written.pictures.append(picture)
        if len(states) > 1:
            write_animation(path.with_suffix(".gif"), [enlarged(state) for state in states], record)


def _write_sheet(target: Target, request: DrawRequest, drawn: Drawn) -> None:
    """One picture as it is, several as a sheet; the animation likewise."""
    captions = [text if request.count == 1 else f"{text} · {seed}" for text, seed in request.pictures()]
    columns = _columns(request)
    is_single = len(drawn.pictures) == 1
    if target.picture is not None:
        picture = drawn.pictures[0] if is_single else contact_sheet(drawn.pictures, captions, columns)
        write_picture(target.picture, picture, request.record())
    if target.animation is not None:
        steps = list(zip(*drawn.states, strict=True))
        frames = [
            enlarged(step[0]) if is_single else contact_sheet(step, captions, columns) for step in steps
        ]
        write_animation(target.animation, frames, request.record())


def _columns(request: DrawRequest) -> int:
    return columns_for(len(request.prompts or request.classes), request.count)


def _report(target: Target, request: DrawRequest, count: int, seconds: float) -> None:
    files = dict.fromkeys(map(str, filter(None, (target.picture, target.animation)))) or [str(target.out)]
    typer.echo(f"{' and '.join(files)}: {_counted(count)}, seed {request.seed}, {seconds:.1f} s")


def _counted(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
