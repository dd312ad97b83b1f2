"""The training script of the shipped model, on a few emoji."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, TrainerCallback, pipeline

from hf_argen import AutoModelForImageGeneration


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("train_emoji")


def options(folder: Path) -> argparse.Namespace:
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    # Every step is a checkpoint, so that a kill can come anywhere.
    return argparse.Namespace(output=folder, sheets=folder / "sheets", seed=0, save_minutes=0.0)


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:  # in the middle of an epoch
            raise KilledError


@pytest.fixture
def killing(script, monkeypatch):
    """Switches the kill on and off."""
    shared = sys.modules["emoji_training"]
    original = shared.PeriodicCallback

    def switch(on: bool) -> None:
        class Both(original, Kill):
            pass

        monkeypatch.setattr(shared, "PeriodicCallback", Both if on else original)

    return switch


def short(stage):
    return replace(stage, epochs=2, batch_size=8, warmup_steps=2)


def train(script, emoji, folder: Path):
    return script.train(emoji, short(script.TOKENIZER_STAGE), short(script.VAR_STAGE), options(folder))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in model.state_dict().items()}


def test_a_killed_run_ends_as_an_unbroken_one(script, emoji, killing, tmp_path, monkeypatch):
    shared = sys.modules["emoji_training"]
    monkeypatch.setattr(shared, "PROMPTS", shared.PROMPTS[:2])
    unbroken, _ = train(script, emoji, tmp_path / "unbroken")
    for _ in range(2):  # once in each stage
        killing(True)
        with pytest.raises(KilledError):
            train(script, emoji, tmp_path / "killed")
        killing(False)
        if not (tmp_path / "killed" / "tokenizer").is_dir():
            stage, chosen = short(script.TOKENIZER_STAGE), options(tmp_path / "killed")
            script.train_tokenizer(script.build_tokenizer, emoji, stage, chosen)
    resumed, processor = train(script, emoji, tmp_path / "killed")
    expected, found = weights(unbroken), weights(resumed)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []

    folder = tmp_path / "model"
    sys.modules["emoji_training"].save(
        folder, resumed.to(torch.bfloat16), processor, card="---\nlicense: apache-2.0\n---\n"
    )
    assert sorted(tmp_path.glob("*.partial")) == []
    assert AutoProcessor.from_pretrained(folder).image_size == (64, 64)
    again = AutoModelForImageGeneration.from_pretrained(folder)
    assert again.generation_config.guidance_scale == script.SAMPLING["guidance_scale"]
    assert pipeline("text-to-image", str(folder))("red apple", seed=0)["image"].size == (64, 64)
    assert len(list((tmp_path / "unbroken" / "sheets").glob("*.png"))) > 0


def test_the_card_names_the_licences(script):
    yardstick = sys.modules["evaluate_emoji"].Yardstick(0.75, 0.5, 25.4, (300, 300))
    card = script.model_card(yardstick, 7_000_000)
    for part in ("OFL-1.1", "fonts-noto-color-emoji", "75.0%", "50.0%", "25.40 dB", "license: apache-2.0"):
        assert part in card
