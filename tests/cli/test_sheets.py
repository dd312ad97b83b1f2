"""Contact sheets."""

import pytest
from PIL import Image, ImageFont

from hf_argen.cli import sheets
from hf_argen.cli.sheets import FONT_SIZE, columns_for, contact_sheet, drawable, sheet_size, wrapped

from ..test_cli import fails
from .conftest import names


def test_captions_are_cut():
    font = ImageFont.load_default(FONT_SIZE)
    lines = wrapped("a very long caption " * 9, font, 128)
    assert len(lines) == 2 and lines[1].endswith("…")
    assert wrapped("x" * 99, font, 128)[0].endswith("…") and wrapped("", font, 128) == []
    assert all(font.getlength(line) <= 128 for line in [*lines, *wrapped("x" * 99, font, 128)])
    sheet = contact_sheet([Image.new("RGB", (300, 200))] * 5, ["x"] * 5, columns=3)
    assert sheet.size == (3 * 308 + 8, 2 * (200 + 17 + 8 + 8) + 8) == sheet_size(5, 3, (300, 200), lines=1)


@pytest.mark.parametrize(
    ("prompts", "count", "columns"),
    [
        (1, 1, 1),
        (1, 3, 3),
        (1, 8, 4),
        (1, 12, 4),
        (1, 17, 6),
        (1, 100, 10),
        (12, 1, 4),
        (3, 4, 4),  # a row for each prompt
        (2, 10, 10),
        (30, 4, 12),  # three prompts in a row
        (500, 2, 32),
        (2, 500, 34),
    ],
)
def test_columns(prompts, count, columns):
    assert columns_for(prompts, count) == columns


def test_sheets_of_any_shape_of_request_are_about_square():
    for total in range(6, 1001):
        for count in (1, 2, 3, 7, 40, total):
            if total % count == 0 and not (1 < count <= sheets.MAX_ROW and total // count <= sheets.MAX_ROWS):
                columns = columns_for(total // count, count)
                rows = -(-total // columns)
                assert 0.4 <= columns / rows <= 2.7, (total, count, columns)


def test_captions_use_the_letters_that_the_font_has():
    font = ImageFont.load_default(FONT_SIZE)
    assert drawable("a cat · 5, “so”…", font) == "a cat · 5, “so”…"
    assert drawable("piñata — crème brûlée", font) == "pinata - creme brulee"
    assert drawable("e\u0301 \u4e2d\u6587 \U0001f34e\u200b\x07\u3000x", font) == "e ?? ? x"


@pytest.mark.parametrize(
    ("out", "many", "words"),
    [
        ("sheet.webp", 1000, ["is too large for a .webp file", "a folder of PNGs"]),
        ("sheet.png", 1000, ["is too large for a .png file"]),
        ("sheet.gif", 400, ["is too large for an animated .gif file"]),
        ("sheet.jpg", 60, ["cannot hold so many prompts", ".png"]),
    ],
)
def test_sheets_that_do_not_fit_are_refused_before_anything_is_drawn(
    text_model, capsys, monkeypatch, tmp_path, out, many, words
):
    monkeypatch.setattr("hf_argen.cli.generating._draw", None)
    prompts = [f"{'a cat and a dog ' * 110}{i}" for i in range(many)] if out == "sheet.jpg" else ["a cat"]
    count = 1 if out == "sheet.jpg" else many
    monkeypatch.setattr(sheets, "MIN_SIDE", 600)
    command = ["generate", *prompts, "-n", count, "--model", text_model, "-o", out]
    fails(capsys, command, *words)
    assert names(tmp_path) == []
