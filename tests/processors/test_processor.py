"""The processor that image families share."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import normalizers
from transformers import AutoProcessor

from hf_argen import VarProcessor

from ..helpers.tiny import text_tokenizer, var_config

NAMES = ["goldfish, Carassius auratus", "volcano", "red wine"]


@pytest.fixture
def labels():
    return VarProcessor(class_names=NAMES, image_size=(16, 24))


def test_labels_by_id_and_name(labels):
    assert labels(class_labels=[2, "Volcano", "goldfish", -1])["class_labels"].tolist() == [2, 1, 0, -1]
    assert labels(class_labels="carassius auratus")["class_labels"].tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": "vulcano"}, "no class 'vulcano'; the closest are 'volcano'"),
        ({"class_labels": []}, "list of class labels is empty"),
        ({"text": "a cat"}, "draws classes, not prompts"),
        ({"images": "cat.png"}, "give PIL images"),
    ],
)
def test_bad_input_of_a_class_model(labels, call, message):
    with pytest.raises(ValueError, match=message):
        labels(**call)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ([], "list of prompts is empty"),
        ("\u200b\x00", "is empty"),
        ("x" * 10_000, "has 10000 characters; 2000 are the most"),
        (["a cat", None], "given as NoneType; give text"),
        (["a cat", 5], "given as int; give text"),
        ("a cat \udcff", "is no valid Unicode text"),
    ],
)
def test_bad_prompts(text, message):
    with pytest.raises(ValueError, match=message):
        VarProcessor(tokenizer=text_tokenizer())(text)


def test_long_prompts_are_cut_with_a_warning():
    tokenizer = text_tokenizer()
    processor = VarProcessor(tokenizer=tokenizer, max_prompt_tokens=4)
    with pytest.warns(UserWarning, match="'a cat and a dog' has 5 tokens; the model reads the first 4"):
        cut = processor(["a cat and a dog", "a cat"])
    assert cut["prompt_ids"].shape == (2, 4)
    whole = VarProcessor(tokenizer=tokenizer)(["a cat and a dog", "a cat"])
    assert torch.equal(cut["prompt_ids"], whole["prompt_ids"][:, :4])
    assert cut["prompt_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_prompts_that_leave_no_token_are_refused():
    tokenizer = text_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()  # drops U+FFFD
    with pytest.raises(ValueError, match="holds nothing that this model reads"):
        VarProcessor(tokenizer=tokenizer)(["a cat", "\ufffd"])


@pytest.mark.parametrize("label", [-2, "-2", np.int64(-7)])
def test_negative_labels_are_refused(labels, label):
    with pytest.raises(ValueError, match="is negative; give an id from 0, or -1 for none"):
        labels(class_labels=[1, label])


def test_pictures_there_and_back(labels):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    pixels = labels(images=[picture, picture])["pixel_values"]
    assert pixels.shape == (2, 3, 16, 24)
    assert pixels.dtype == torch.float32
    back = labels.postprocess((pixels + 1) / 2)
    assert np.array_equal(np.array(back[1]), np.array(picture))


def test_pictures_of_other_sizes_and_modes(labels):
    wide = Image.new("RGB", (200, 20), "red")
    clear = Image.new("RGBA", (30, 40), (0, 0, 0, 0))
    pixels = labels(images=[wide, clear, Image.new("L", (5, 5), 0)])["pixel_values"]
    assert pixels.shape == (3, 3, 16, 24)
    assert pixels[0, 0].min() == 1
    assert pixels[1].min() == 1  # transparent becomes white
    assert pixels[2].max() == -1


def test_photos_are_turned_upright(labels):
    photo = Image.new("RGB", (24, 16), "black")
    photo.paste("white", (0, 0, 24, 8))
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter to the right
    stored = io.BytesIO()
    turned.save(stored, "PNG", exif=exif)
    opened = Image.open(stored)
    assert opened.size == (16, 24)
    assert torch.equal(labels(images=opened)["pixel_values"], labels(images=photo)["pixel_values"])
    assert torch.equal(labels.preprocess_masks(opened), labels.preprocess_masks(photo))


def test_sixteen_bits_of_grey_are_scaled(labels):
    grey = Image.fromarray(np.tile(np.linspace(0, 65535, 24).astype(np.uint16), (16, 1)))
    pixels = labels(images=grey)["pixel_values"][0, 0, 0]
    assert torch.allclose(pixels, torch.linspace(-1, 1, 24), atol=0.01)


def test_a_picture_of_an_extreme_shape_takes_no_memory(labels):
    assert labels(images=Image.new("RGB", (100_000, 1)))["pixel_values"].shape == (1, 3, 16, 24)


def test_save_and_load(labels, tmp_path):
    var_config().save_pretrained(tmp_path)
    labels.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VarProcessor
    assert loaded.to_dict() == labels.to_dict()
