"""The model that comes with the package draws what it is asked for."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, pipeline

from hf_argen import AutoModelForImageGeneration
from hf_argen.assets import DEFAULT_MODEL, default_model
from hf_argen.data.emoji import EmojiSet, nearest_emoji, psnr

EVALUATE = Path(__file__).parents[1] / "scripts" / "evaluate_emoji.py"


@pytest.fixture(scope="module")
def evaluate_emoji():
    spec = importlib.util.spec_from_file_location("evaluate_emoji", EVALUATE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageGeneration.from_pretrained(default_model(), dtype="float32").eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(default_model())


@pytest.fixture(scope="module")
def emoji() -> EmojiSet:
    return EmojiSet.load(64)


def test_it_is_small_and_half_precision():
    assert sum(file.stat().st_size for file in DEFAULT_MODEL.iterdir()) <= 16_000_000
    with safe_open(DEFAULT_MODEL / "model.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}


def test_the_card_states_the_yardstick_and_the_licences():
    card = (DEFAULT_MODEL / "README.md").read_text(encoding="utf-8")
    for part in ("accuracy by Unicode name", "held-out caption", "PSNR", "OFL-1.1", "license: apache-2.0"):
        assert part in card


def test_reconstruction(model, emoji, evaluate_emoji):
    pictures = emoji.pixel_values(range(0, len(emoji), 8))
    found = evaluate_emoji.reconstruct(model.image_tokenizer, pictures)
    assert psnr(found, pictures.add(1).mul(0.5), value_range=1.0).mean() >= 25


@pytest.mark.parametrize("held_out, least", [(False, 0.9), (True, 0.35)])
def test_accuracy(model, processor, emoji, evaluate_emoji, held_out, least):
    """On a third of the prompts, which leaves room for chance; `scripts/evaluate_emoji.py` takes all."""
    targets, prompts = emoji.prompts(held_out=held_out, count=100)
    pictures = evaluate_emoji.draw(model, processor, prompts, batch_size=25)
    hits = (nearest_emoji(pictures, emoji.font) == targets).mean()
    assert hits >= least


def test_a_prompt_that_it_never_saw():
    picture = pipeline("text-to-image")("purple banana", seed=0)["image"]
    assert picture.size == (64, 64)
    assert len(picture.getcolors(64 * 64)) > 100  # not blank
