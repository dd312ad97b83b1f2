"""
`make demo`: pictures and an animation from a converted checkpoint, offline.

Converts one of the small reference checkpoints in the authors' format (tests/goldens), draws a few classes, and writes
a contact sheet and a GIF that shows the pictures growing from scale to scale.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_argen import convert_original
from hf_argen.auto import new_processor

CASE = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "var" / "d2_adaln_l2_q4"
CLASSES = tuple(range(8))
COLUMNS = 4
ENLARGEMENT = 2
MARGIN = 16
LINE = 26
PAPER, INK, GREY = "#ffffff", "#1a1a1a", "#767676"
FRAME_MS, LAST_FRAME_MS = 600, 1800


class ScaleStreamer:
    """Keeps the pictures (batch, 3, height, width) that `generate` hands out after every scale."""

    def __init__(self):
        self.scales: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.scales.append(value)

    def end(self) -> None:
        pass


def convert(case: Path) -> torch.nn.Module:
    """The model of a reference case; its `case.json` names files and the authors' constructor arguments."""
    recipe = json.loads((case / "case.json").read_text())["convert"]
    files = {role: case / name for role, name in recipe["files"].items()}
    return convert_original("var", files, recipe["original_config"])


def sheet(pictures: list[Image.Image], captions: list[str], title: str, note: str) -> Image.Image:
    """Pictures in a grid, enlarged without smoothing, each above its caption."""
    width, height = (side * ENLARGEMENT for side in pictures[0].size)
    rows = -(-len(pictures) // COLUMNS)
    top = MARGIN + 2 * LINE + MARGIN // 2
    size = (MARGIN + COLUMNS * (width + MARGIN), top + rows * (height + LINE + MARGIN))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=ImageFont.load_default(20))
    draw.text((MARGIN, MARGIN + LINE), note, fill=GREY, font=ImageFont.load_default(14))
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(i, COLUMNS)
        x, y = MARGIN + column * (width + MARGIN), top + row * (height + LINE + MARGIN)
        page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        place = (x + width // 2, y + height + 5)
        draw.text(place, caption, fill=INK, font=ImageFont.load_default(15), anchor="ma")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    times = []

    start = time.perf_counter()
    model = convert(CASE)
    processor = new_processor(model.config)
    times.append(("checkpoint converted", f"{CASE.name} (authors' format)", time.perf_counter() - start))

    start = time.perf_counter()
    streamer = ScaleStreamer()
    # One generator per picture: a picture then depends on its class and seed, not on the batch around it.
    generators = [torch.Generator().manual_seed(options.seed) for _ in CLASSES]
    output = model.generate(
        class_labels=list(CLASSES),
        guidance_scale=4.0,
        top_k=30,
        top_p=0.95,
        do_sample=True,
        generator=generators,
        streamer=streamer,
        return_dict_in_generate=True,
    )
    drawn = f"{len(CLASSES)} of {output.images.shape[3]}x{output.images.shape[2]} px, {output.steps} scales"
    times.append(("pictures drawn", drawn, time.perf_counter() - start))

    start = time.perf_counter()
    captions = [f"class {label}" for label in CLASSES]
    note = "random test weights: abstract pictures"
    page = sheet(processor.postprocess(output.images), captions, "VAR, next-scale prediction", note)
    page.save(options.out / "sheet.png")
    times.append(("contact sheet", str(options.out / "sheet.png"), time.perf_counter() - start))

    start = time.perf_counter()
    frames = []
    for step, images in enumerate(track(streamer.scales, "animating", console=console, transient=True)):
        side = model.config.grid_sizes[step]
        title = f"After scale {step + 1} of {output.steps}: {side[0]}x{side[1]} tokens"
        frames.append(sheet(processor.postprocess(images), captions, title, note))
    frames[0].save(
        options.out / "scales.gif",
        save_all=True,
        append_images=frames[1:],
        duration=[FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS],
        loop=0,
    )
    times.append(("animation", str(options.out / "scales.gif"), time.perf_counter() - start))

    table = Table("step", "what", "seconds", title="hf_argen demo")
    table.columns[2].justify = "right"
    for step, what, seconds in times:
        table.add_row(step, what, f"{seconds:.2f}")
    console.print(table)
    console.print("The weights are random test weights, so the pictures are abstract.")


if __name__ == "__main__":
    main()
