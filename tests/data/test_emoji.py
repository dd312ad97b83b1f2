"""The emoji yardstick: the set, its pictures, its captions and its metric."""

import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_argen.data import emoji as module
from hf_argen.data.emoji import (
    EmojiCaptions,
    EmojiFontError,
    EmojiSet,
    accuracy,
    emoji_list,
    find_font,
    nearest_emoji,
    psnr,
    render,
    render_all,
    split_captions,
    to_pixel_values,
    to_uint8,
)


@pytest.fixture(scope="module")
def emoji_set() -> EmojiSet:
    return EmojiSet.load(64)


# Words: none of these needs the font.


def test_the_set_is_frozen():
    emoji = emoji_list()
    assert len(emoji) == 1391
    points = [one.codepoint for one in emoji]
    assert points == sorted(set(points)) and points[0] > 0xFF
    words = "\n".join(f"{one.codepoint:X}|{'|'.join(one.captions)}" for one in emoji)
    assert hashlib.sha256(words.encode()).hexdigest()[:16] == "94c8256534baee7b"


def test_every_emoji_has_its_unicode_name_first():
    by_point = {one.codepoint: one for one in emoji_list()}
    assert by_point[0x1F34E].captions == ["red apple", "apple, fruit, red"]
    assert by_point[0x1F534].captions == ["large red circle", "red circle", "circle, geometric, red"]
    assert by_point[0x1F602].captions == [
        "face with tears of joy",
        "face, face with tears of joy, joy, laugh, tear",
    ]
    assert by_point[0x20E3].captions == ["combining enclosing keycap"]
    for one in emoji_list():
        assert one.name and one.captions[0] == one.name
        assert all(caption == caption.lower().strip() for caption in one.captions)
        assert len(set(one.captions)) == len(one.captions)


def test_a_tenth_of_the_pairs_is_held_out_and_never_a_name():
    emoji = emoji_list()
    train, held_out = split_captions()
    pairs = sum(len(one.captions) for one in emoji)
    assert sum(map(len, held_out)) == round(0.1 * pairs)
    assert sum(map(bool, held_out)) >= 300
    for one, seen, hidden in zip(emoji, train, held_out, strict=True):
        assert seen[0] == one.name and one.name not in hidden
        assert set(hidden) <= set(one.captions)
        # Nothing of the pair is left beside the same picture, not even as one keyword among others.
        assert not set(hidden) & {part for caption in seen for part in (caption, *caption.split(", "))}


def test_the_split_is_frozen():
    # Neither Python's hash seed nor its version may change what counts as held out.
    assert hashlib.sha256(repr(split_captions()).encode()).hexdigest()[:16] == "4a2a0420ea45cc16"


# Pictures.


def test_pictures_are_as_the_yardstick_says(emoji_set):
    assert emoji_set.images.shape == (1391, 64, 64, 3) and emoji_set.images.dtype == np.uint8
    # Invariants rather than hashes, since another FreeType may round another pixel.
    index = [one.codepoint for one in emoji_list()].index(0x1F534)
    red_circle = emoji_set.images[index].astype(int)
    assert (red_circle[0, 0] == 255).all() and (red_circle[-1, -1] == 255).all()
    assert red_circle[32, 32, 0] > 180 and red_circle[32, 32, 1:].max() < 120
    assert abs(red_circle[:, :32] - red_circle[:, :31:-1]).mean() < 12
    spread = emoji_set.images.reshape(1391, -1).astype(int).std(axis=1)
    assert spread.min() > 5
    assert len(np.unique(emoji_set.images.reshape(1391, -1), axis=0)) == 1391


def test_rendering_is_deterministic_and_resizes(emoji_set):
    again = render("🍎", 64)
    index = emoji_set.names.index("red apple")
    assert np.array_equal(np.asarray(again), emoji_set.images[index])
    for size in (16, 32, 128):
        assert render(0x1F34E, size).size == (size, size)
    small = np.asarray(render(0x1F34E, 16)).astype(int)
    averaged = emoji_set.images[index].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert abs(small - averaged).mean() < 6


def test_cache_gives_the_same_pictures(tmp_path):
    drawn = render_all(8, cache_dir=tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert np.array_equal(render_all(8, cache_dir=tmp_path / "new"), drawn)
    np.save(file, drawn[::-1])
    assert np.array_equal(render_all(8, cache_dir=tmp_path / "new"), drawn[::-1])


# The font.


@pytest.mark.parametrize("way", ["argument", "variable", "nowhere"])
def test_a_missing_font_names_the_package(way, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FONT_PLACES", (str(tmp_path / "none.ttf"),))
    monkeypatch.delenv("HF_ARGEN_EMOJI_FONT", raising=False)
    if way == "variable":
        monkeypatch.setenv("HF_ARGEN_EMOJI_FONT", str(tmp_path / "absent.ttf"))
    with pytest.raises(EmojiFontError, match="fonts-noto-color-emoji") as caught:
        EmojiSet.load(64, font=tmp_path / "absent.ttf" if way == "argument" else None)
    assert "HF_ARGEN_EMOJI_FONT" in str(caught.value) and "\n" not in str(caught.value)


def test_a_font_is_found_by_argument_before_variable(tmp_path, monkeypatch):
    first, second = tmp_path / "first.ttf", tmp_path / "second.ttf"
    first.touch()
    second.touch()
    monkeypatch.setenv("HF_ARGEN_EMOJI_FONT", str(second))
    assert find_font() == second
    assert find_font(first) == first


def test_a_damaged_font_is_refused(tmp_path):
    path = tmp_path / "broken.ttf"
    path.write_bytes(find_font().read_bytes()[:2000])
    with pytest.raises(EmojiFontError, match=r"broken\.ttf"):
        render("🍎", font=path)


def test_a_character_that_the_font_lacks_is_refused():
    with pytest.raises(EmojiFontError, match="U\\+4E2D"):
        render("中")


# Training pairs.


def test_captions_follow_seed_and_epoch(emoji_set):
    pictures = torch.arange(len(emoji_set))
    data = EmojiCaptions(emoji_set, seed=3, pictures=pictures, key="input_ids")
    assert data[7]["input_ids"] == 7

    def captions(epoch, seed=3):
        other = EmojiCaptions(emoji_set, seed=seed, pictures=pictures)
        other.set_epoch(epoch)
        return [other[i]["caption"] for i in range(len(other))]

    assert captions(0) == captions(0)
    assert captions(0) != captions(1)
    assert captions(0) != captions(0, seed=4)
    words = [
        {part for caption in seen for part in caption.split(", ")} | set(seen) for seen in emoji_set.train
    ]
    drawn = [captions(epoch) for epoch in range(40)]
    for epoch in drawn:
        for i, caption in enumerate(epoch):
            assert caption not in emoji_set.held_out[i]
            assert caption in words[i] or set(caption.split(", ")) <= words[i]
    # All training captions come up, names included.
    joy = emoji_set.names.index("face with tears of joy")
    assert set(emoji_set.train[joy]) <= {epoch[joy] for epoch in drawn}


def test_training_pairs_load_in_batches(emoji_set):
    batch = next(iter(DataLoader(EmojiCaptions(emoji_set), batch_size=5)))
    assert batch["pixel_values"].shape == (5, 3, 64, 64)
    assert batch["pixel_values"].min() >= -1 and batch["pixel_values"].max() <= 1
    assert len(batch["caption"]) == 5


def test_pictures_must_match_the_set(emoji_set):
    with pytest.raises(ValueError, match="3 pictures for 1391"):
        EmojiCaptions(emoji_set, pictures=torch.zeros(3, 4))


# The metric.


def test_prompts(emoji_set):
    indices, names = emoji_set.prompts()
    assert len(set(indices)) == 300 and names == [emoji_set.names[i] for i in indices]
    assert indices == emoji_set.prompts()[0] != emoji_set.prompts(seed=1)[0]
    indices, captions = emoji_set.prompts(held_out=True)
    assert len(set(indices)) == 300
    assert all(caption in emoji_set.held_out[i] for i, caption in zip(indices, captions, strict=True))


def test_the_pictures_themselves_are_recognised(emoji_set):
    pictures = (emoji_set.pixel_values() + 1) / 2
    assert accuracy(pictures, range(len(emoji_set))) == 1.0
    assert accuracy(emoji_set.images, range(len(emoji_set))) == 1.0


def test_slightly_damaged_pictures_are_recognised_and_noise_is_not(emoji_set):
    indices, _ = emoji_set.prompts()
    generator = torch.Generator().manual_seed(0)
    pictures = (emoji_set.pixel_values(indices) + 1) / 2
    noise = torch.rand(pictures.shape, generator=generator)
    assert accuracy(0.95 * pictures + 0.05 * noise, indices) > 0.95
    assert accuracy(noise, indices) < 0.02
    assert accuracy(pictures, indices[1:] + indices[:1]) == 0.0


def test_nearest_is_the_smallest_distance(emoji_set):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(4, 3, 32, 32, generator=generator)
    known = render_all(32).astype(float)
    wanted = to_uint8(pictures).astype(float)
    distances = ((wanted[:, None] - known[None]) ** 2).sum(axis=(2, 3, 4))
    assert nearest_emoji(pictures).tolist() == distances.argmin(axis=1).tolist()


def test_accuracy_refuses_what_it_cannot_judge(emoji_set):
    with pytest.raises(ValueError, match="2 pictures for 1 targets"):
        accuracy(emoji_set.images[:2], [0])
    with pytest.raises(ValueError, match="no picture"):
        accuracy(emoji_set.images[:0], [])


def test_psnr_is_per_picture():
    picture = torch.zeros(3, 3, 8, 8)
    other = picture.clone()
    other[0] += 0.2
    other[1] += 0.02
    assert psnr(picture, other).tolist() == pytest.approx([20.0, 40.0, 100.0], abs=1e-3)
    assert psnr(picture, other, value_range=1.0)[0].item() == pytest.approx(13.979, abs=1e-2)


def test_pixels_there_and_back():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    values = to_pixel_values(images)
    assert values.shape == (2, 3, 5, 7) and values.min() >= -1 and values.max() <= 1
    assert np.array_equal(to_uint8((values + 1) / 2), images)
