"""What `generate` refuses: one sentence that names the value, before anything is drawn."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import hf_argen
from hf_argen import NextScale, VarForImageGeneration

from ..helpers.language_models import language_model, prompts
from ..helpers.tiny import spread, text_tokenizer, text_var_config, tiny_llamagen, tiny_var, var_config

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return tiny_var()


@pytest.fixture(scope="module")
def text_model():
    torch.manual_seed(3)
    return spread(VarForImageGeneration(text_var_config(len(text_tokenizer()))))


def refuses(model, match, labels=(1,), **options):
    state = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        model.generate(labels, **{"do_sample": True, **options})
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state), "something was drawn"


# Conditions


@pytest.mark.parametrize("label", [6, 1000, 2**40, -2, -100])
def test_label_out_of_range(model, label):
    match = rf"class label {label} is out of range; this model has the classes 0 to 4, and -1 for none\."
    for labels in (label, [1, label], torch.tensor([label])):
        refuses(model, match, labels)
    ids = torch.zeros(1, 21, dtype=torch.long)
    with pytest.raises(ValueError, match=match):
        model(input_ids=ids, class_labels=torch.tensor([label]))


@pytest.mark.parametrize(
    "labels",
    [1.5, "1", ["red"], [1.0], [None], {1}, [[1, 2]], True, [True], torch.ones(2), torch.tensor([True])],
)
def test_labels_that_are_no_whole_numbers(model, labels):
    refuses(model, r"class_labels are .*; give .*whole numbers", labels)


def test_labels_in_many_forms(model):
    """Among them the authors' null class, which is the number of classes."""
    expected = model.generate([1, 2], do_sample=False)
    for labels in ((1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2], dtype=torch.int32)):
        assert torch.equal(model.generate(labels, do_sample=False), expected)
    for label in (1, np.int64(1), torch.tensor(1)):
        assert torch.equal(model.generate(label, do_sample=False), expected[:1])
    assert torch.equal(model.generate(5, do_sample=False), model.generate(-1, do_sample=False))


def test_no_labels_at_all(model):
    refuses(model, "list of conditions is empty", [])


def test_prompts_for_a_model_of_classes(model):
    for name in ("prompt_embeds", "prompt_ids", "prompt_attention_mask"):
        refuses(model, f"draws from class labels; it cannot read {name}", None, **{name: torch.ones(1, 3)})
    with pytest.raises(ValueError, match="give class_labels alone"):
        model.condition(torch.tensor([1]), prompt_embeds=torch.ones(1, 3))


IDS = torch.tensor([[1, 2, 3]])
BAD_PROMPTS = {
    r"prompt_ids lie in \[501, 503\]; the text encoder has \d+ tokens": {"prompt_ids": IDS + 500},
    r"prompt_ids lie in \[-1, 1\]": {"prompt_ids": IDS - 2},
    r"prompt_ids are torch\.int64 of the shape \(3,\)": {"prompt_ids": IDS[0]},
    r"prompt_ids are torch\.int64 of the shape \(1, 0\)": {"prompt_ids": IDS[:, :0]},
    r"prompt_ids are torch\.float32": {"prompt_ids": IDS.float()},
    r"prompt_ids are given as list": {"prompt_ids": [[1, 2]]},
    r"prompt has 600 tokens; the text encoder takes 512": {"prompt_ids": IDS.repeat(1, 200)},
    r"prompt_attention_mask has the shape \(1, 2\); these prompts have \(1, 3\)": {
        "prompt_ids": IDS,
        "prompt_attention_mask": torch.ones(1, 2),
    },
    r"prompt_attention_mask has the shape \(2, 3\)": {
        "prompt_embeds": torch.ones(1, 3, 24),
        "prompt_attention_mask": torch.ones(2, 3),
    },
    r"prompt_embeds have the shape \(1, 23\); this model takes \(batch, 24\)": {
        "prompt_embeds": torch.ones(1, 23)
    },
    r"prompt_embeds have the shape \(1, 1, 3, 24\)": {"prompt_embeds": torch.ones(1, 1, 3, 24)},
    r"give either prompt_ids or prompt_embeds": {"prompt_ids": IDS, "prompt_embeds": torch.ones(1, 24)},
    r"draws from text; give prompt_ids or prompt_embeds, not class_labels": {"class_labels": [1]},
}


@pytest.mark.parametrize("match", BAD_PROMPTS)
def test_prompts_that_do_not_fit(text_model, match):
    options = dict(BAD_PROMPTS[match])
    refuses(text_model, match, options.pop("class_labels", None), **options)


def test_prompt_ids_without_text_encoder():
    model = VarForImageGeneration(var_config(condition_type="text", text_embed_dim=7))
    refuses(model, "has no text encoder; give prompt_embeds", None, prompt_ids=IDS)
    with pytest.raises(ValueError, match="not class_labels"):
        model.condition(class_labels=torch.tensor([1]))


# Options


@pytest.mark.parametrize(
    "name, values, rule",
    [
        ("guidance_scale", [-1, -0.1, NAN, INF, "3", [1.0]], r"must be a finite number, 0 \(no guidance\)"),
        ("temperature", [0, -1.0, NAN, "1"], r"must be a number above 0 \(do_sample=False"),
        ("top_k", [-1, 17, 2.5, NAN, "3"], r"must lie in \[0, 16\], 0 is off"),
        ("top_p", [-0.1, 1.1, NAN, "0.5"], r"must lie in \[0, 1\]"),
        ("num_return_sequences", [0, -1, 2.5, "2"], "must be a whole number of at least 1"),
    ],
)
def test_values_out_of_range(model, name, values, rule):
    for value in values:
        refuses(model, rf"{name} is .*; it {rule}", **{name: value})
        if not isinstance(value, str | list):  # also from a configuration
            config = GenerationConfig()
            setattr(config, name, value)
            refuses(model, rf"{name} is .*; it {rule}", generation_config=config)


def test_values_at_the_ends_of_their_ranges(model):
    plain = model.generate([1], do_sample=True, generator=torch.Generator().manual_seed(1))
    for options in ({"top_k": 0}, {"top_k": 16}, {"top_p": 0.0}, {"top_p": 1.0}, {"guidance_scale": 0}):
        ids = model.generate([1], do_sample=True, generator=torch.Generator().manual_seed(1), **options)
        assert torch.equal(ids, plain), options


@pytest.mark.parametrize(
    "schedule, match",
    [
        ("lin", "guidance_schedule is 'lin'; known are constant, interval, linear, power_cosine, soft_cfg"),
        (3, "guidance_schedule is 3; known are"),
        ([1, 1], "has 2 factors; this model takes 3 steps"),
        ([0, -1, 1], "gives -1 at step 1; every factor must be finite, 0 or above"),
        ([0, 1, NAN], "gives nan at step 2"),
        (lambda step, steps: -step, "gives -1 at step 1"),
    ],
)
def test_guidance_schedules_that_are_none(model, schedule, match):
    refuses(model, match, guidance_schedule=schedule, guidance_scale=1.5)


@pytest.mark.parametrize("count", [2, 6, 22, 1.5])
def test_numbers_of_tokens_at_which_no_scale_ends(model, count):
    for name in ("max_new_tokens", "max_length"):
        refuses(model, r"scales end after \[1, 5, 21\] tokens: choose one of these", **{name: count})
    assert model.generate([1], max_length=5).shape == (1, 5)


@pytest.mark.parametrize(
    "decoding, match",
    [
        ("nxt_scale", r"no decoding 'nxt_scale'; known are .*Did you mean 'next_scale'\?"),
        ({"type": "next_word"}, "no decoding 'next_word'"),
        ({"smooth": True}, 'its name under "type"'),
        ({"type": "next_scale", "smoth": True}, "NextScale has no option smoth; it has smooth, "),
        (3, "decoding is a int; give an instance"),
        (NextScale, "decoding is <class .*; give an instance"),
        ({"type": "next_scale", "top_k": [1, 2]}, "top_k has 2 values; this model has 3 scales"),
        ({"type": "next_scale", "top_k": [1, 2, 17]}, "top_k holds 17; this model has 16 codes"),
        ({"type": "next_scale", "top_k": [1, 2.5, 3]}, "top_k holds 2.5; its values must be whole numbers"),
        ({"type": "next_scale", "top_k": 3}, "top_k is 3; give a list with one value per scale"),
        ({"type": "next_scale", "temperature": [1, 0, 1]}, "temperature holds 0; .*numbers above 0"),
        ({"type": "next_scale", "temperature": [1, NAN, 1]}, "temperature holds nan"),
        ({"type": "next_scale", "edit_mode": "x"}, "edit_mode is 'x'; it must be 'tokens' or 'features'"),
    ],
)
def test_decodings_that_are_none(model, decoding, match):
    refuses(model, match, decoding=decoding)


def test_smooth_without_sampling(model):
    refuses(model, "it needs do_sample=True", decoding=NextScale(smooth=True), do_sample=False)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "paged"},
        {"output_scores": True},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"eos_token_id": 3},
        {"forced_eos_token_id": 3},
        {"min_new_tokens": 3},
        {"stop_strings": "x"},
        {"penalty_alpha": 0.5},
        {"prompt_lookup_num_tokens": 3},
        {"encoder_repetition_penalty": 2.0},
        {"watermarking_config": {}},
        {"length_penalty": 2.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_cannot_be_honoured(model, options):
    refuses(
        model, rf"generate\(\) of VarForImageGeneration does not support {next(iter(options))}", **options
    )
    refuses(model, r"does not support", generation_config=GenerationConfig(**options))


def test_options_of_transformers_that_are_off(model):
    off = {"num_beams": 1, "use_cache": True, "output_scores": False, "min_length": 0, "length_penalty": 1.0}
    expected = model.generate([1], do_sample=False)
    for options in (off, {"generation_config": GenerationConfig(**off)}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate([1], do_sample=False, **options), expected)


@pytest.mark.parametrize("name", ["attention_mask", "assistant_model", "seed", "negative_prompt_ids", "topk"])
def test_unknown_keywords(model, name):
    refuses(model, rf"generate\(\) of VarForImageGeneration has no keyword '{name}'\.", **{name: 1})


@pytest.mark.parametrize(
    "options, match",
    [
        ({"generator": 3}, "generator is 3; give a torch.Generator"),
        ({"generator": [torch.Generator(), 1]}, "generator is .*; give a torch.Generator"),
        ({"generator": [torch.Generator()] * 2}, "2 generators were given for 1 pictures"),
        ({"logits_processor": "x"}, "logits_processor is 'x'; give a list"),
        ({"stopping_criteria": [3]}, r"stopping_criteria is \[3\]; give a list"),
        ({"streamer": 3}, "streamer is 3; give an object with the methods put and end"),
        ({"generation_config": {"top_k": 3}}, "generation_config is a dict; give a GenerationConfig"),
    ],
)
def test_helpers_that_are_none(model, options, match):
    refuses(model, match, **options)


# Editing

PICTURE, TOKENS, MASK = torch.zeros(1, 3, 16, 16), torch.zeros(1, 21, dtype=torch.long), torch.ones(4, 4)


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16)])
def test_picture_of_the_wrong_channels(model, shape):
    match = r"pixel_values have the shape \(.*\); expected \(batch, 3, height, width\)"
    refuses(model, match, pixel_values=torch.zeros(shape), keep_mask=MASK)


@pytest.mark.parametrize("size", [(17, 16), (32, 32), (8, 8)])
def test_picture_of_the_wrong_size(model, size):
    match = rf"pixel_values are {size[0]}x{size[1]} pixels; .* needs 16x16"
    refuses(model, match, pixel_values=torch.zeros(1, 3, *size), keep_mask=MASK)


@pytest.mark.parametrize("shape", [(5, 5), (4,), (), (1, 3, 4, 4), (4, 16), (1, 1, 1, 4, 4)])
def test_mask_of_the_wrong_shape(model, shape):
    match = r"keep_mask has the shape \(.*\); give .* of 4x4 tokens or 16x16 pixels"
    refuses(model, match, pixel_values=PICTURE, keep_mask=torch.ones(shape))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"pixel_values": PICTURE}, "Editing needs keep_mask and the source picture"),
        ({"keep_mask": MASK}, "Editing needs keep_mask and the source picture"),
        ({"pixel_values": PICTURE, "input_ids": TOKENS, "keep_mask": MASK}, "Editing needs"),
        (
            {"pixel_values": PICTURE.repeat(2, 1, 1, 1), "keep_mask": MASK},
            "source picture is 2; it must be 1",
        ),
        ({"pixel_values": PICTURE, "keep_mask": MASK.repeat(2, 1, 1)}, "keep_mask is 2; it must be 1"),
        ({"pixel_values": PICTURE.numpy(), "keep_mask": MASK}, "pixel_values are given as ndarray"),
        ({"pixel_values": PICTURE, "keep_mask": "left"}, "keep_mask is a str; give a tensor"),
        ({"input_ids": TOKENS[:, :20], "keep_mask": MASK}, r"ids have the shape \(1, 20\)"),
        ({"input_ids": TOKENS.float(), "keep_mask": MASK}, r"ids are torch\.float32; give whole numbers"),
        ({"pixel_values": PICTURE.byte(), "keep_mask": MASK}, r"pixel_values are torch\.uint8"),
        ({"input_ids": TOKENS + 16, "keep_mask": MASK}, r"ids lie in \[16, 16\]; the codebook has 16 codes"),
    ],
)
def test_sources_that_do_not_fit(model, options, match):
    refuses(model, match, do_sample=False, **options)


# Damaged weights


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    "name",
    [
        "head.out_proj.weight",
        "model.class_embedding.weight",
        "model.layers.1.mlp.fc1.weight",
        "model.position_embedding",
        "image_tokenizer.quantizer.embedding.weight",
    ],
)
def test_weights_that_give_nan(model, name, value):
    """Met while sampling, greedily or not, also where one number of many is damaged."""
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.get_parameter(name).view(-1)[:: 3 if "embedding" in name else 50] = value
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 3, "top_p": 0.9, "guidance_scale": 1.5},
    ):
        with pytest.raises(ValueError, match="produced NaN or infinite logits; its weights are damaged"):
            damaged.generate([1], **options)


class Forbids:
    """A logits processor that leaves the second picture of two no token, at every step or from one on."""

    def __init__(self, value: float = -INF, first: int = 0):
        self.value, self.first = value, first

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] >= self.first:
            scores[len(scores) // 2 :] = self.value
        return scores


DRAFTS = [None, "speculative_jacobi", "speculative_decoding"]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("decoding", ["next_scale", *DRAFTS])
def test_rows_without_any_token(model, decoding, do_sample):
    """Logits processors that forbid all tokens, or give NaN; nothing is said where they do so after the last token."""
    one = model if decoding == "next_scale" else tiny_llamagen()
    tokens = {"max_new_tokens": 5}
    options = {"decoding": decoding, "do_sample": do_sample, **tokens}
    for first in (0, 3) if one is not model else (0,):
        for value, message in (
            (-INF, "Row 1 allows no token, all its logits are -inf"),
            (NAN, "Row 1 has logits"),
        ):
            with pytest.raises(ValueError, match=message):
                one.generate([1, 2], logits_processor=[Forbids(value, first)], **options)
    free = one.generate([1, 2], logits_processor=[Forbids(first=5)], **options)
    assert free.shape == (2, 5)


@pytest.mark.parametrize("decoding", ["next_token", *DRAFTS[1:]])
def test_rows_of_language_models_without_any_token(decoding):
    inputs = {name: value[1:] for name, value in prompts().items()}
    with pytest.raises(ValueError, match="Row 1 allows no token, all its logits are -inf"):
        hf_argen.generate(
            language_model(),
            decoding,
            **inputs,
            logits_processor=[Forbids()],
            max_new_tokens=3,
            do_sample=True,
        )


def test_image_tokenizer_that_gives_nan(model):
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.image_tokenizer.decoder.conv_out.weight.view(-1)[-1] = NAN
    with pytest.raises(ValueError, match="image tokenizer of VarForImageGeneration produced NaN"):
        damaged.generate([1], return_dict_in_generate=True)
    with pytest.raises(ValueError, match="image tokenizer of VarForImageGeneration produced NaN"):
        damaged.decode_images(damaged.generate([1]))


# The teacher-forced pass


@pytest.mark.parametrize(
    "inputs, match",
    [
        ({}, "give class_labels alone"),
        ({"class_labels": [1]}, "give a tensor"),
        ({"class_labels": torch.tensor([1, 2])}, "There are 2 conditions for 1 pictures"),
        ({"class_labels": torch.tensor([1]), "labels": TOKENS[:, :5]}, r"labels have the shape \(1, 5\)"),
        ({"class_labels": torch.tensor([1]), "input_ids": TOKENS + 16}, "the codebook has 16 codes"),
        ({"class_labels": torch.tensor([1]), "input_ids": TOKENS[:, :20]}, r"one of \[1, 5, 21\]"),
    ],
)
def test_teacher_forced_pass(model, inputs, match):
    with pytest.raises(ValueError, match=match):
        model(**{"input_ids": TOKENS, **inputs})
