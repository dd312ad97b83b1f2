"""Contact sheets: pictures in a grid, each with its caption."""

import math
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 128  # smaller pictures are enlarged
MARGIN = 8
FONT_SIZE = 13
LINE = 17
MAX_LINES = 2
MAX_ROW = 10  # pictures of one prompt that stay in one row
MAX_ROWS = 20
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212"
WIDEST = 3  # columns above the square that are tried for a grid without gaps

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture at the smallest whole multiple of its size that is comfortable to look at."""
    size = enlarged_size(picture.size)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BICUBIC)


def enlarged_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture on a sheet."""
    factor = max(1, math.ceil(MIN_SIDE / min(size)))
    return size[0] * factor, size[1] * factor


def columns_for(prompts: int, count: int) -> int:
    """Columns of a sheet: one row for each of several prompts as long as that is handy, else about square."""
    total = prompts * count
    if prompts > 1 and 1 < count <= MAX_ROW and prompts <= MAX_ROWS:
        return count
    square = math.ceil(math.sqrt(total))
    if prompts > 1 and 1 < count <= square:
        return count * round(math.sqrt(total) / count)
    if total <= 5:
        return total
    return min(range(square, square + WIDEST), key=lambda columns: (-total % columns, columns))


def sheet_size(total: int, columns: int, picture: tuple[int, int], lines: int = MAX_LINES) -> tuple[int, int]:
    """(width, height) of a sheet of `total` pictures of the size `picture` with captions of up to `lines` lines."""
    width, height = enlarged_size(picture)
    row = height + LINE * lines + 2 * MARGIN
    return columns * (width + MARGIN) + MARGIN, math.ceil(total / columns) * row + MARGIN


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """
    Args:
        pictures: all of one size.
        captions: one for each; long ones are cut after two lines.
        columns: default: as many as make the sheet about square.
    """
    columns = min(columns or columns_for(1, len(pictures)), len(pictures))
    font = ImageFont.load_default(FONT_SIZE)
    width, height = enlarged_size(pictures[0].size)
    texts = [wrapped(drawable(caption, font), font, width) for caption in captions]
    lines = max(map(len, texts))
    sheet = Image.new("RGB", sheet_size(len(pictures), columns, pictures[0].size, lines), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, texts, strict=True)):
        x = MARGIN + i % columns * (width + MARGIN)
        y = MARGIN + i // columns * (height + LINE * lines + 2 * MARGIN)
        sheet.paste(enlarged(picture), (x, y))
        for j, line in enumerate(caption):
            place = (x + width / 2, y + height + MARGIN / 2 + j * LINE)
            draw.text(place, line, fill="black", font=font, anchor="ma")
    return sheet


def drawable(text: str, font: Font) -> str:
    """The text in letters that the font of PIL has: without accents, and "?" for what has no such letter."""

    def drawn(letter: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    box = drawn("\U0002ffff")  # never assigned, so this is how a letter that is missing looks

    def has(letter: str) -> bool:
        return drawn(letter) != box

    def letters(letter: str) -> str:
        if letter.isspace() or letter in DASHES:
            return " " if letter.isspace() else "-"
        if unicodedata.category(letter)[0] in "CM":  # controls, and marks that stand on other letters
            return ""
        if letter.isascii() or has(letter):
            return letter
        plain = "".join(
            one for one in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(one)
        )
        return plain if plain and all(map(has, plain)) else "?"

    return "".join(map(letters, text))


def wrapped(text: str, font: Font, width: int) -> list[str]:
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


def _cut(line: str, font: Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
