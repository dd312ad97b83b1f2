"""The training script of the small masked models, on a few emoji."""

import argparse
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoProcessor, T5Config

from hf_argen import AutoModelForImageGeneration, Decoding, MarForImageGeneration

TINY_TOKENIZER = {"base_channels": 8, "channel_multiplier": [1, 1, 1, 2], "latent_channels": 4}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "text_embed_dim": 16}
TINY_TEXT = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def script(load_script):
    module = load_script("train_masked")
    full = {name: dict(head) for name, head in module.HEADS.items()}
    module.full_sizes = dict(module.TOKENIZER), dict(module.MAR), dict(module.TEXT_ENCODER), full
    module.TOKENIZER |= TINY_TOKENIZER
    module.TEXT_ENCODER |= TINY_TEXT
    module.MAR |= TINY
    for head in module.HEADS.values():
        head |= {"width": 16, "depth": 1}
    module.HEADS["diffusion"]["num_sampling_steps"] = 4
    return module


def short(stage):
    return replace(stage, epochs=2, batch_size=8, warmup_steps=2)


@pytest.fixture
def options(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "masked"  # the tokenizer is trained once for all
    shared = sys.modules["emoji_training"]
    monkeypatch.setattr(shared, "PROMPTS", shared.PROMPTS[:2])
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    return argparse.Namespace(
        output=folder, sheets=folder / "sheets", seed=0, save_minutes=60.0, text_encoder=None
    )


def test_models_are_trained_and_saved(script, emoji, options):
    """The second learns on the transformer of the first, so they are one test, which no worker can split."""
    for head in ("diffusion", "shortcut"):
        train_and_save(script, emoji, options, head)
    first, second = (
        AutoModelForImageGeneration.from_pretrained(options.output / f"emoji-mar-{head}").model.state_dict()
        for head in ("diffusion", "shortcut")
    )
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def train_and_save(script, emoji, options, head):
    folder = options.output
    tokenizer = folder / "tokenizer" / "model.safetensors"
    before = tokenizer.stat().st_mtime_ns if tokenizer.is_file() else None
    assert (script.trained_transformer(folder, head) is None) == (head == "diffusion")
    model, processor = script.train(head, emoji, short(script.TOKENIZER_STAGE), short(script.STAGE), options)
    assert before in (None, tokenizer.stat().st_mtime_ns)
    latents = model.image_tokenizer.encode(emoji.pixel_values())
    assert latents.std().item() == pytest.approx(1.0, abs=0.02)

    card = script.model_card(head, sys.modules["evaluate_emoji"].Yardstick(0.75, 0.5, 25.4, (9, 9)), 10**6)
    place = folder / f"emoji-mar-{head}"
    sys.modules["emoji_training"].save(place, model.to(torch.bfloat16), processor, card=card)
    assert "75.0%" in card and "OFL-1.1" in card and head in card
    again = AutoModelForImageGeneration.from_pretrained(place)
    prompts = AutoProcessor.from_pretrained(place)(["red apple", "two cats"])
    drawn = again.generate(**prompts, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    assert drawn.shape == (2, 64, 4) and torch.isfinite(drawn).all()
    assert Decoding.from_config(again.generation_config).num_steps == script.DECODING["num_steps"]
    assert again.generation_config.guidance_scale == script.SAMPLING["guidance_scale"]


def test_a_killed_run_goes_on(script, emoji, options, tmp_path):
    """Resumed from a checkpoint in its middle, training ends with the same weights."""
    shared = sys.modules["emoji_training"]
    tokenizer = script.train_tokenizer(
        script.build_tokenizer,
        emoji,
        short(script.TOKENIZER_STAGE),
        options,
        trainer_class=script.AutoencoderTrainer,
        finish=script.set_latent_scale,
    )
    processor = script.prompt_processor(emoji, options.output / "processor", script.LlamaGenProcessor)
    ends = []
    for kind in ("whole", "resumed"):
        folder = tmp_path / kind
        if kind == "resumed":  # what a kill leaves
            folder.mkdir()
            checkpoints = sorted(
                (tmp_path / "whole").glob("checkpoint-*"), key=lambda one: int(one.name[11:])
            )
            checkpoints[0].rename(folder / checkpoints[0].name)
        torch.manual_seed(0)
        model = script.build_model(tokenizer, processor, "diffusion")
        chosen = argparse.Namespace(**{**vars(options), "save_minutes": 0.0})
        shared.train_generator(model, processor, emoji, short(script.STAGE), chosen, folder)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


def test_how_a_run_began_is_kept(script, tmp_path):
    """A transformer that is there only later changes nothing; the model itself and its drafter start anew."""
    assert script.trained_transformer(tmp_path, "flow") is None
    (tmp_path / "emoji-mar-diffusion").mkdir()
    (tmp_path / "emoji-mar-diffusion" / "config.json").touch()
    assert script.trained_transformer(tmp_path, "flow") is None
    assert script.trained_transformer(tmp_path, "energy") == tmp_path / "emoji-mar-diffusion"
    assert script.trained_transformer(tmp_path, "diffusion") is None
    assert script.trained_transformer(tmp_path, "drafter") is None


def test_sizes(script):
    """The models of the script fit into 12 MB in bfloat16, and every head's options are those it has."""
    tokenizer, mar, text, heads = script.full_sizes
    for name, head in heads.items():
        config = script.MarConfig(
            image_tokenizer_config=script.KlVaeConfig(**tokenizer),
            text_encoder_config=T5Config(vocab_size=2048, **text),
            head_config={"type": name, **head},
            **mar,
        )
        with torch.device("meta"):
            model = MarForImageGeneration(config)
        size = 2 * sum(parameter.numel() for parameter in model.parameters())
        assert size < 11.9e6, (name, size)
