"""Writes src/hf_argen/data/emoji_captions.tsv, the code points, names, short names and keywords of the emoji set.

Needs `apt-get install fonts-noto-color-emoji unicode-cldr-core` and the Unicode names of version 14 or later. The file
is frozen: 1,391 code points above U+00FF which Unicode 14.0 names and the font draws, so that the set depends neither
on the interpreter's Unicode version nor on the release of the font.

    python scripts/make_emoji_captions.py
"""

import argparse
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "src" / "hf_argen" / "data" / "emoji_captions.tsv"
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
ANNOTATIONS = "/usr/share/unicode/cldr/common/annotations/en.xml"
AGES = "/usr/share/unicode/DerivedAge.txt"
HEADER = """\
# Emoji of Noto Color Emoji: code point, Unicode name, CLDR short name, CLDR keywords separated by " | ".
# Made by scripts/make_emoji_captions.py from Unicode 14.0 and CLDR 41 (common/annotations/en.xml).
# Names and annotations: Copyright (c) 1991-2022 Unicode, Inc., under the Unicode License (SPDX Unicode-DFS-2016),
# https://www.unicode.org/license.txt
"""


def newest_named(limit: str, path: str) -> set[int]:
    """Code points assigned in Unicode `limit` or earlier, from DerivedAge.txt (Debian package unicode-data)."""
    points = set()
    bound = tuple(int(part) for part in limit.split("."))
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        fields = [field.strip() for field in line.split("#")[0].split(";")]
        if len(fields) == 2 and tuple(int(part) for part in fields[1].split(".")) <= bound:
            first, _, last = fields[0].partition("..")
            points.update(range(int(first, 16), int(last or first, 16) + 1))
    return points


def is_drawn(font: ImageFont.FreeTypeFont, point: int, missing: bytes) -> bool:
    """Whether the font has a picture of its own, neither blank nor the box of missing glyphs."""
    canvas = Image.new("RGB", (136, 128), "white")
    blank = canvas.tobytes()
    ImageDraw.Draw(canvas).text((0, 0), chr(point), font=font, embedded_color=True)
    return canvas.tobytes() not in (blank, missing)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--font", default=FONT)
    parser.add_argument("--annotations", default=ANNOTATIONS)
    parser.add_argument("--ages", default=AGES)
    args = parser.parse_args()
    short_names, keywords = {}, {}
    for node in ElementTree.parse(args.annotations).iter("annotation"):
        target = short_names if node.get("type") == "tts" else keywords
        target[node.get("cp")] = node.text.strip()
    font = ImageFont.truetype(args.font, 109, layout_engine=ImageFont.Layout.BASIC)
    canvas = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(canvas).text((0, 0), chr(0x2FFFF), font=font, embedded_color=True)
    assigned = newest_named("14.0", args.ages)
    rows = []
    for point in sorted(assigned):
        name = unicodedata.name(chr(point), "") if point > 0xFF else ""
        # Letters of scripts outside the emoji blocks cannot be drawn by the font, so this stays quick enough.
        if name and is_drawn(font, point, canvas.tobytes()):
            char = chr(point)
            rows.append(
                f"{point:04X}\t{name.lower()}\t{short_names.get(char, '').lower()}\t"
                f"{keywords.get(char, '').lower()}"
            )
    OUTPUT.write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{OUTPUT}: {len(rows)} emoji, {OUTPUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
