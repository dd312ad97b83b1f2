"""Forms of guidance: strengths by definition, the convention of a family, SoftCFG."""

import math

import pytest
import torch
from transformers import DynamicCache

from hf_argen.generation.guidance import Guidance, Interval, PowerCosine, SoftCFG

from ..helpers.tiny import NEXT_TOKEN_FAMILIES, tiny_llamagen, tiny_next_token


@pytest.fixture(params=NEXT_TOKEN_FAMILIES)
def family(request):
    return request.param


def strengths(scale, schedule, neutral=0.0, steps=5):
    guidance = Guidance(scale, schedule, neutral)
    return [guidance.strength(step, steps) for step in range(steps)]


def test_strengths():
    assert strengths(3.0, "constant") == [3.0] * 5
    assert strengths(4.0, "linear") == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert strengths(2.0, {"type": "interval", "start": 1, "stop": 3}) == [0.0, 2.0, 2.0, 0.0, 0.0]
    assert (
        strengths(2.0, Interval(stop=2))
        == strengths(2.0, {"type": "interval", "stop": 2})
        == [2.0, 2.0, 0, 0, 0]
    )
    assert strengths(4.0, {"type": "power_cosine", "power": 0}) == strengths(4.0, "constant")
    power = strengths(4.0, {"type": "power_cosine", "power": 2.5})
    assert power == strengths(4.0, PowerCosine(2.5))
    assert power == pytest.approx([2 * (1 - math.cos(math.pi * (step / 5) ** 2.5)) for step in range(5)])
    assert strengths(2.0, {"type": "soft_cfg", "schedule": "linear"}) == strengths(2.0, "linear")


def test_the_scale_that_means_no_guidance():
    assert strengths(1.75, "constant", neutral=1.0) == [0.75] * 5
    for scale in (0.0, 0.5, 1.0):
        assert Guidance(scale, "constant", 1.0).is_off(5)
    assert not Guidance(0.5, "constant", 0.0).is_off(5)


@pytest.mark.parametrize(
    "schedule, message",
    [
        (
            "cosine",
            "guidance_schedule is 'cosine'; known are constant, interval, linear, power_cosine, soft_cfg",
        ),
        ({"start": 3}, "guidance_schedule is None"),
        ({"type": "interval", "begin": 3}, "'interval' has no option begin"),
        ({"type": "interval", "start": 3, "stop": 1}, r"The guidance interval is \[3, 1\)"),
        ({"type": "power_cosine", "power": -1}, "power of the guidance schedule is -1"),
    ],
)
def test_bad_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        Guidance(2.0, schedule)


@torch.no_grad()
@pytest.mark.parametrize(
    "schedule", ["constant", "linear", Interval(2, 9), PowerCosine(2.0), [1.0] * 8 + [0.0] * 8]
)
def test_guided_logits(family, schedule):
    """Against two teacher-forced passes."""
    model = tiny_next_token(family)
    output = model.generate(
        [1, 3],
        guidance_scale=3.0,
        guidance_schedule=schedule,
        do_sample=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    conditional, null = (
        model(input_ids=output.sequences, class_labels=torch.tensor(labels)).logits
        for labels in ([1, 3], [-1, -1])
    )
    strength = torch.tensor(strengths(3.0, schedule, 1.0, 16)).view(1, 16, 1)
    assert torch.allclose(output.logits, (1 + strength) * conditional - strength * null, atol=1e-3)


def test_stored_schedules_are_used(tmp_path):
    model = tiny_llamagen()
    model.generation_config.guidance_schedule = {"type": "interval", "stop": 4}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    options = {"guidance_scale": 4.0, "do_sample": False}
    expected = model.generate([2], guidance_schedule=Interval(stop=4), **options)
    assert torch.equal(loaded.generate([2], **options), expected)
    assert not torch.equal(loaded.generate([2], guidance_schedule="constant", **options), expected)


# SoftCFG


def test_weights_of_soft_guidance():
    certainty = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.5, 0.5]])
    assert torch.equal(SoftCFG(normalize=False).value_weights(certainty), 1 - certainty)
    weights = SoftCFG().value_weights(certainty)
    assert torch.allclose(weights, torch.tensor([[0.5, 0.75, 0.75]] * 2))
    assert torch.allclose((1 - weights).sum(dim=1), torch.ones(2))


class WeighedCache(DynamicCache):
    """Values times given factors, for one pass over a whole sequence."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx)
        return keys, values * self.weights[:, None, :, None]


@torch.no_grad()
@pytest.mark.parametrize("normalize", [True, False])
def test_soft_guidance(family, normalize):
    """With one layer values depend on nothing but their tokens, so that a pass over all of them tells each step."""
    model = tiny_next_token(family, num_hidden_layers=1)
    output = model.generate(
        [1, 3],
        guidance_scale=2.5,
        guidance_schedule={"type": "soft_cfg", "normalize": normalize},
        do_sample=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences
    conditional = model(input_ids=ids, class_labels=torch.tensor([1, 3])).logits
    certainty = conditional.softmax(-1).amax(-1)
    null = model.null_prompt(model.prompt(class_labels=torch.tensor([1, 3])))
    prefix = null.embeds.shape[1]
    for step in range(ids.shape[1]):
        drawn = certainty[:, :step]
        if normalize and step:
            drawn = drawn / drawn.sum(dim=1, keepdim=True)
        weights = torch.cat([torch.ones(2, prefix), 1 - drawn], dim=1)
        embeds = torch.cat([null.embeds, model.model.embed_tokens(ids[:, :step])], dim=1)
        positions = torch.arange(step + prefix).expand(2, -1)
        mask = torch.full((step + prefix, step + prefix), -1e9).triu(1)[None, None]
        unconditional = model.next_logits(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=WeighedCache(weights),
            **null.context,
        )[:, 0]
        expected = unconditional + 2.5 * (conditional[:, step] - unconditional)
        assert torch.allclose(output.logits[:, step], expected, atol=1e-3), step


def test_soft_guidance_changes_the_picture_and_needs_plain_decoding():
    model = tiny_llamagen()
    options = {"guidance_scale": 6.0, "do_sample": False}
    plain = model.generate([1], **options)
    assert not torch.equal(model.generate([1], guidance_schedule="soft_cfg", **options), plain)
    with pytest.raises(ValueError, match=r"SoftCFG weighs every token .* use decoding='next_token'"):
        model.generate([1], guidance_schedule="soft_cfg", decoding="speculative_jacobi", **options)
