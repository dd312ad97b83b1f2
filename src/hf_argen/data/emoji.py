"""
The emoji yardstick: pictures of Noto Color Emoji and the words that describe them.

The set is frozen: 1,391 code points above U+00FF that Unicode 14.0 names and the font draws (skin tones, regional
indicator letters and the enclosing keycap included). Each has up to three captions: its lower-case Unicode name, its
CLDR short name, and its CLDR keywords as one comma-separated caption. One tenth of all (emoji, caption) pairs, never
a Unicode name, is held out. Neither the set nor the split depends on the versions of Python, Unicode or the font.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

DEBIAN_PACKAGE = "fonts-noto-color-emoji"
FONT_VARIABLE = "HF_ARGEN_EMOJI_FONT"
HELD_OUT_SHARE = 0.1
CANVAS = (136, 128)
FONT_SIZE = 109  # the only size of the font's bitmaps
METRIC_SIZE = 32
# Where scripts/fetch_emoji_font.py puts it when the machine has none.
ENVIRONMENT_FONT = Path(sys.prefix, "share", "fonts", "NotoColorEmoji.ttf")
FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    ENVIRONMENT_FONT,
)


class EmojiFontError(OSError):
    """The emoji font is missing or cannot draw the set."""


@dataclass(frozen=True)
class Emoji:
    """
    One emoji and its words, all lower-case.

    Attributes:
        codepoint: its Unicode code point.
        name: Unicode name.
        short_name: CLDR short name, empty where CLDR has none.
        keywords: CLDR keywords.
    """

    codepoint: int
    name: str
    short_name: str
    keywords: tuple[str, ...]

    @property
    def captions(self) -> list[str]:
        """The Unicode name, then the short name and the joined keywords where they differ from what stands before."""
        return list(dict.fromkeys(filter(None, (self.name, self.short_name, ", ".join(self.keywords)))))


@lru_cache(maxsize=1)
def emoji_list() -> tuple[Emoji, ...]:
    """The 1,391 emoji in order of code point."""
    text = resources.files(__package__).joinpath("emoji_captions.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return tuple(
        Emoji(int(point, 16), name, short_name, tuple(filter(None, keywords.split(" | "))))
        for point, name, short_name, keywords in rows
    )


def split_captions(emoji: Sequence[Emoji] | None = None) -> tuple[list[list[str]], list[list[str]]]:
    """
    Splits the (emoji, caption) pairs into those for training and those held out.

    The pairs with the smallest SHA-256 of code point and caption are held out, a tenth of all pairs. A held-out short
    name is also taken out of the keywords of its emoji, so that a model never sees it beside that picture.

    Returns:
        The training captions of each emoji, its Unicode name first, and the held-out captions of each emoji.
    """
    emoji = emoji_list() if emoji is None else emoji
    pairs = [(one.codepoint, caption) for one in emoji for caption in one.captions[1:]]
    pairs.sort(key=lambda pair: _rank(f"{pair[0]:X} {pair[1]}"))
    held_out_pairs = set(pairs[: round(HELD_OUT_SHARE * (len(pairs) + len(emoji)))])
    train: list[list[str]] = []
    held_out: list[list[str]] = []
    for one in emoji:
        hidden = [caption for caption in one.captions if (one.codepoint, caption) in held_out_pairs]
        joined = ", ".join(one.keywords)
        kept = [caption for caption in one.captions if caption not in hidden and caption != joined]
        keywords = [keyword for keyword in one.keywords if keyword not in hidden]
        if keywords and joined not in hidden and ", ".join(keywords) not in kept:
            kept.append(", ".join(keywords))
        train.append(kept)
        held_out.append(hidden)
    return train, held_out


def find_font(font: str | os.PathLike | None = None) -> Path:
    """
    The file of Noto Color Emoji: `font`, else the variable HF_ARGEN_EMOJI_FONT, else the usual places.

    Raises:
        EmojiFontError: no such file.
    """
    named = font or os.environ.get(FONT_VARIABLE)
    for place in [named] if named else FONT_PLACES:
        path = Path(place).expanduser()
        if path.is_file():
            return path
    where = f"at {named}" if named else "in the usual places"
    raise EmojiFontError(
        f"Noto Color Emoji was not found {where}: install the Debian package {DEBIAN_PACKAGE} "
        f"(apt-get install {DEBIAN_PACKAGE}), or name the file NotoColorEmoji.ttf by font= or {FONT_VARIABLE}."
    )


@lru_cache(maxsize=2)
def _open_font(path: Path) -> ImageFont.FreeTypeFont:
    try:
        # The basic layout gives the same pixels as Raqm, which not every build of PIL has.
        return ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise EmojiFontError(
            f"{path} cannot be drawn at size {FONT_SIZE} ({error}): use the bitmap font NotoColorEmoji.ttf of the "
            f"Debian package {DEBIAN_PACKAGE}."
        ) from error


def _draw(codepoint: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("RGB", CANVAS, "white")
    ImageDraw.Draw(canvas).text((0, 0), chr(codepoint), font=font, embedded_color=True)
    return canvas


def render(codepoint: int | str, size: int = 64, font: str | os.PathLike | None = None) -> Image.Image:
    """
    Draws one emoji: at size 109 at (0, 0) on a white 136x128 canvas, then resized (bicubic) to size x size.

    Args:
        codepoint: the code point, or the character itself.
        size: side of the picture.
        font: file of the font; see [`find_font`].

    Raises:
        EmojiFontError: the font is missing, or has no picture for this code point.
    """
    if isinstance(codepoint, str):
        codepoint = ord(codepoint)
    path = find_font(font)
    opened = _open_font(path)
    picture = _draw(codepoint, opened)
    if picture.tobytes() in _empty_pictures(path):
        raise EmojiFontError(
            f"{path} has no picture for U+{codepoint:04X}: use the font of the Debian package {DEBIAN_PACKAGE}."
        )
    return picture.resize((size, size), Image.Resampling.BICUBIC)


@lru_cache(maxsize=2)
def _empty_pictures(path: Path) -> frozenset[bytes]:
    """What a code point without a picture looks like: nothing, or the font's box (U+2FFFF is never assigned)."""
    return frozenset(
        (Image.new("RGB", CANVAS, "white").tobytes(), _draw(0x2FFFF, _open_font(path)).tobytes())
    )


def render_all(
    size: int = 64, font: str | os.PathLike | None = None, cache_dir: str | os.PathLike | None = None
) -> np.ndarray:
    """
    All emoji as an array (1391, size, size, 3) uint8, in the order of [`emoji_list`].

    Args:
        cache_dir: folder that keeps the array for the next call, one file per font and size.
    """
    path = find_font(font)
    cached = None
    if cache_dir is not None:
        stat = path.stat()
        key = hashlib.sha256(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
        cached = Path(cache_dir) / f"emoji-{size}-{key}.npy"
        if cached.is_file():
            return np.load(cached)
    images = np.stack([np.asarray(render(one.codepoint, size, path)) for one in emoji_list()])
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: a killed process leaves no half file behind.
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".npy", delete=False) as file:
            np.save(file, images)
        os.replace(file.name, cached)
    return images


@dataclass
class EmojiSet:
    """
    The pictures with their words.

    Attributes:
        emoji: the emoji, in order of code point.
        images: (emoji, size, size, 3) uint8.
        train: training captions of each emoji, its Unicode name first.
        held_out: held-out captions of each emoji, often none.
        font: file the pictures were drawn with.
    """

    emoji: tuple[Emoji, ...]
    images: np.ndarray = field(repr=False)
    train: list[list[str]] = field(repr=False)
    held_out: list[list[str]] = field(repr=False)
    font: Path

    @classmethod
    def load(
        cls,
        size: int = 64,
        font: str | os.PathLike | None = None,
        cache_dir: str | os.PathLike | None = None,
    ) -> "EmojiSet":
        """Draws the set at size x size and splits its captions; `font` and `cache_dir` as in [`render_all`]."""
        path = find_font(font)
        return cls(emoji_list(), render_all(size, path, cache_dir), *split_captions(), path)

    def __len__(self) -> int:
        return len(self.emoji)

    @property
    def names(self) -> list[str]:
        """Unicode names, lower-case."""
        return [one.name for one in self.emoji]

    @property
    def size(self) -> int:
        """Side of the pictures."""
        return self.images.shape[1]

    def pixel_values(self, indices: Sequence[int] | None = None) -> torch.Tensor:
        """The pictures, or those with these indices, as float32 (n, 3, size, size) in [-1, 1]."""
        return to_pixel_values(self.images if indices is None else self.images[np.asarray(indices)])

    def prompts(self, held_out: bool = False, count: int = 300, seed: int = 0) -> tuple[list[int], list[str]]:
        """
        The yardstick's random emoji and their captions.

        Args:
            held_out: give a held-out caption, drawn among the emoji that have one, instead of the Unicode name.

        Returns:
            Indices of at most `count` emoji and one caption for each.
        """
        chosen = [i for i in range(len(self)) if self.held_out[i] or not held_out]
        chosen.sort(key=lambda i: _rank(f"{seed} {self.emoji[i].codepoint:X}"))
        chosen = chosen[:count]
        return chosen, [(self.held_out if held_out else self.train)[i][0] for i in chosen]


class EmojiCaptions(Dataset):
    """
    Training pairs: item i is the picture of emoji i with one of its training captions.

    The caption depends on seed, epoch and emoji alone, so a resumed run sees the captions that an unbroken one would
    have seen; the trainer calls `set_epoch`. Half of the draws from the keywords give only some of them, in random
    order, because people name one or two things, not five.

    Args:
        emoji: the set.
        seed: of the draws.
        pictures: one tensor per emoji to give instead of the pixels, e.g. the ids of a frozen tokenizer.
        key: name of the picture's entry in an item.
    """

    def __init__(
        self, emoji: EmojiSet, seed: int = 0, pictures: torch.Tensor | None = None, key: str = "pixel_values"
    ):
        self.emoji, self.seed, self.epoch, self.key = emoji, seed, 0, key
        self.pictures = emoji.pixel_values() if pictures is None else pictures
        if len(self.pictures) != len(emoji):
            raise ValueError(f"There are {len(self.pictures)} pictures for {len(emoji)} emoji.")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the captions of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> dict:
        return {self.key: self.pictures[index], "caption": self.caption(index)}

    def caption(self, index: int) -> str:
        """The caption of emoji `index` in this epoch."""
        draws = np.frombuffer(_digest(f"{self.seed} {self.epoch} {index}"), dtype=np.uint32).tolist()
        captions = self.emoji.train[index]
        caption = captions[draws[0] % len(captions)]
        if ", " not in caption or draws[1] % 2:
            return caption
        keywords = sorted(caption.split(", "), key=lambda keyword: _rank(f"{draws[2]} {keyword}"))
        return ", ".join(keywords[: 1 + draws[3] % len(keywords)])


def to_pixel_values(images: np.ndarray) -> torch.Tensor:
    """Pictures (n, height, width, 3) uint8 as float32 (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Pictures (n, 3, height, width) in [0, 1] as (n, height, width, 3) uint8."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def nearest_emoji(images: torch.Tensor | np.ndarray, font: str | os.PathLike | None = None) -> np.ndarray:
    """
    Index of the emoji nearest to each picture, by L2 at 32x32.

    Args:
        images: (n, 3, height, width) float in [0, 1], as `model.decode_images` gives them, or (n, height, width, 3)
            uint8.

    Returns:
        (n,) int64 indices into [`emoji_list`].
    """
    pictures = to_uint8(images) if isinstance(images, torch.Tensor) else images
    side = (METRIC_SIZE, METRIC_SIZE)
    small = np.stack(
        [np.asarray(Image.fromarray(picture).resize(side, Image.Resampling.BICUBIC)) for picture in pictures]
    )
    wanted = torch.from_numpy(small.reshape(len(small), -1).astype(np.float64))
    known = torch.from_numpy(_metric_pictures(find_font(font)))
    # Squared distances less the wanted pictures' own squares; exact, being whole numbers far below 2^53.
    return (known.square().sum(dim=1) - 2 * wanted @ known.T).argmin(dim=1).numpy()


@lru_cache(maxsize=2)
def _metric_pictures(path: Path) -> np.ndarray:
    return render_all(METRIC_SIZE, path).reshape(len(emoji_list()), -1).astype(np.float64)


def accuracy(
    images: torch.Tensor | np.ndarray, targets: Sequence[int], font: str | os.PathLike | None = None
) -> float:
    """
    Share of the pictures whose nearest emoji is the one asked for.

    Args:
        images: as for [`nearest_emoji`].
        targets: index of the wanted emoji for each picture.
    """
    if len(images) != len(targets):
        raise ValueError(f"There are {len(images)} pictures for {len(targets)} targets.")
    if len(images) == 0:
        raise ValueError("There is no picture to judge.")
    return float((nearest_emoji(images, font) == np.asarray(targets)).mean())


def psnr(images: torch.Tensor, references: torch.Tensor, value_range: float = 2.0) -> torch.Tensor:
    """
    Peak signal-to-noise ratio in dB of each picture.

    Args:
        images, references: (n, channels, height, width).
        value_range: largest minus smallest value; 2 for pixels in [-1, 1], 1 for [0, 1].

    Returns:
        (n,) float32, at most 100.
    """
    error = (images.float() - references.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(value_range**2 / error.clamp_min(value_range**2 * 1e-10))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _rank(text: str) -> str:
    """A sort key that shuffles alike on every machine and in every version of Python."""
    return hashlib.sha256(text.encode()).hexdigest()
