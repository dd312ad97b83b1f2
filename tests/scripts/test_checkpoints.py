"""The trained next-token models that decodings are measured on: what they weigh, draw, and gain from drafts."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hf_argen.data.emoji import EmojiSet

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
MODELS = ("emoji-llamagen", "emoji-rar")


@pytest.fixture(scope="module")
def emoji() -> EmojiSet:
    return EmojiSet.load(64)


@pytest.fixture(scope="module", params=MODELS)
def bench(request, load_script, emoji):
    script = load_script("benchmark_decodings")
    drafter = CHECKPOINTS / "emoji-llamagen-drafter"
    options = argparse.Namespace(dtype="float32", drafter=str(drafter), draw_batch=60, seed=0)
    return script.Bench(str(CHECKPOINTS / request.param), emoji, options)


@pytest.mark.parametrize("name", [*MODELS, "emoji-llamagen-drafter"])
def test_it_is_small_half_precision_and_described(name):
    folder = CHECKPOINTS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 12_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("accuracy by Unicode name", "held-out caption", "PSNR", "OFL-1.1", "license: apache-2.0"):
        assert part in card


def test_it_draws_what_it_is_asked_for(bench):
    """On a fifth of the prompts, which leaves room for chance; `scripts/benchmark_decodings.py` takes all."""
    bench.options.count = 60
    assert bench.score({"type": "next_token"}, "name").accuracy >= 0.6


@pytest.mark.parametrize(
    "decoding",
    [
        {"type": "speculative_jacobi"},
        {"type": "maximal_coupling_jacobi"},
        {"type": "relaxed_acceptance", "delta": 0.0},
    ],
)
def test_drafts_of_a_trained_model_are_accepted(bench, decoding):
    """Each call of the model gives more than its one token; with random weights hardly any draft is kept."""
    bench.options.count = 4
    assert bench.score(decoding, "name").kept > 1.2
