"""The processor that image families share."""

import numpy as np
import pytest
import torch
from PIL import Image
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
        ("x" * 10_000, "has 10000 characters"),
    ],
)
def test_bad_prompts(text, message):
    with pytest.raises(ValueError, match=message):
        VarProcessor(tokenizer=text_tokenizer())(text)


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


def test_save_and_load(labels, tmp_path):
    var_config().save_pretrained(tmp_path)
    labels.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VarProcessor
    assert loaded.to_dict() == labels.to_dict()
