"""Contact sheets: pictures in a grid, each with its caption."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 128  # smaller pictures are enlarged
MARGIN = 8
FONT_SIZE = 13
LINE = 17
MAX_LINES = 2


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture at the smallest whole multiple of its size that is comfortable to look at."""
    factor = max(1, math.ceil(MIN_SIDE / min(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    return picture if factor == 1 else picture.resize(size, Image.Resampling.BICUBIC)


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """
    Args:
        pictures: all of one size.
        captions: one for each; long ones are cut after two lines.
        columns: default: as many as make the sheet about square.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    columns = min(columns, len(pictures))
    cells = [enlarged(picture) for picture in pictures]
    width, height = cells[0].size
    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrapped(caption, font, width) for caption in captions]
    text_height = LINE * max(map(len, texts)) + MARGIN
    rows = math.ceil(len(cells) / columns)
    step_x, step_y = width + MARGIN, height + text_height + MARGIN
    sheet = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (cell, lines) in enumerate(zip(cells, texts, strict=True)):
        x, y = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        sheet.paste(cell, (x, y))
        for j, line in enumerate(lines):
            place = (x + width / 2, y + height + MARGIN / 2 + j * LINE)
            draw.text(place, line, fill="black", font=font, anchor="ma")
    return sheet


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in up to `MAX_LINES` lines of `width` pixels."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < MAX_LINES:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    if words:
        lines[-1] += "…"
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
