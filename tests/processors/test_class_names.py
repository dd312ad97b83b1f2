"""Names of classes: the ImageNet list and the search in it."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_argen import VarProcessor
from hf_argen.auto import new_processor
from hf_argen.processors.class_names import find_class, imagenet_class_names

from ..helpers.tiny import var_config

NAMES = ["wild boar, boar, Sus scrofa", "pig, Sus scrofa", "crane", "crane", "Cardigan, corgi", "cardigan"]


def test_the_imagenet_list():
    names = imagenet_class_names()
    assert len(names) == 1000
    facts = {0: "tench, Tinca tinca", 207: "golden retriever", 277: "red fox, Vulpes vulpes", 980: "volcano"}
    assert {i: names[i] for i in facts} == facts
    assert names[999].startswith("toilet tissue") and not any("_" in name for name in names)


@pytest.mark.parametrize(("name", "found"), [("boar", 0), (" PIG ", 1), ("corgi", 4), ("cardigan", 5)])
def test_the_best_fit_wins(name, found):
    assert find_class(name, NAMES) == found


def test_names_of_several_classes_are_refused():
    with pytest.raises(ValueError, match=r"Several classes are called 'Crane': 2 \(crane\) and 3 \(crane\)"):
        find_class("Crane", NAMES)
    with pytest.raises(ValueError, match="Several classes are called 'sus scrofa': 0"):
        find_class("sus scrofa", NAMES)


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("red focks", "'red fox'"),
        ("fox", "'red fox'"),
        ("retriever", "'golden retriever'"),
        ("", "class_names"),
    ],
)
def test_closest_names_are_offered(name, offered):
    with pytest.raises(ValueError, match=f"There is no class {name!r}; .*{offered}"):
        find_class(name, imagenet_class_names())


def test_models_of_1000_classes_know_the_names():
    processor = new_processor(var_config(num_classes=1000))
    assert processor(class_labels=["red fox", "volcano", 3, np.int64(4)])["class_labels"].tolist() == [
        277,
        980,
        3,
        4,
    ]
    assert processor(class_labels=torch.tensor([5, -1]))["class_labels"].tolist() == [5, -1]
    assert new_processor(var_config(num_classes=10)).class_names is None


def test_ids_may_be_typed():
    assert VarProcessor()(class_labels=["3", "-1"])["class_labels"].tolist() == [3, -1]
    digits = VarProcessor(class_names=["nine", "9", "8"])
    assert digits(class_labels=["9", "1", 9])["class_labels"].tolist() == [1, 1, 9]


def test_masks():
    processor = VarProcessor(image_size=(4, 4))
    mask = Image.new("RGB", (8, 16), "black")
    mask.paste("white", (0, 0, 4, 16))
    repaint = processor.preprocess_masks([mask, mask])
    assert repaint.shape == (2, 4, 4) and repaint.dtype == torch.bool
    assert repaint[0].tolist() == [[True, True, False, False]] * 4
    with pytest.raises(ValueError, match="A mask is given as str; give PIL images"):
        processor.preprocess_masks("mask.png")
