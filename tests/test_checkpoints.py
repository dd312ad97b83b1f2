"""The small next-token models on which decodings are measured."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from hf_argen import AutoModelForImageGeneration, RelaxedAcceptance
from hf_argen.data.emoji import EmojiSet, accuracy

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
NAMES = ("emoji-llamagen", "emoji-rar")
DRAFTER = "emoji-llamagen-drafter"
COUNT = 40


def load(name: str):
    """A model as it is measured: in bf16, with its processor."""
    model = AutoModelForImageGeneration.from_pretrained(CHECKPOINTS / name, dtype=torch.bfloat16)
    return model.eval(), AutoProcessor.from_pretrained(CHECKPOINTS / name)


@pytest.fixture(scope="module", params=NAMES)
def trained(request):
    return load(request.param)


@pytest.mark.parametrize("name", [*NAMES, DRAFTER])
def test_they_are_small(name):
    files = list((CHECKPOINTS / name).glob("*.safetensors"))
    assert 0 < sum(file.stat().st_size for file in files) <= 12_000_000


def draw(trained, **options):
    model, processor = trained
    emoji = EmojiSet.load()
    targets, prompts = emoji.prompts(count=COUNT)
    generators = [torch.Generator().manual_seed(i) for i in range(COUNT)]
    output = model.generate(
        **processor(prompts), generator=generators, return_dict_in_generate=True, **options
    )
    return output, accuracy(output.images, targets, emoji.font)


def test_accuracy(trained):
    assert draw(trained)[1] >= 0.6


@pytest.mark.parametrize("decoding", ["speculative_jacobi", "maximal_coupling_jacobi"])
def test_jacobi_gains_and_loses_nothing(trained, decoding):
    output, hits = draw(trained, decoding=decoding)
    assert hits >= 0.6
    kept = output.accept_lengths
    assert kept[kept > 0].float().mean() > 1.3


def test_the_drafter_drafts_for_both(trained):
    output, hits = draw(trained, decoding=RelaxedAcceptance(drafter=load(DRAFTER)[0], delta=0.0))
    assert hits >= 0.6
    kept = output.accept_lengths
    assert kept[kept > 0].float().mean() > 1.3
