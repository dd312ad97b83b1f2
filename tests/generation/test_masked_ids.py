"""Masked generation of ids against what TiTok's code drew, and its own rules."""

import itertools

import pytest
import torch
from PIL import Image
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
    pipeline,
)

from hf_argen import Masked, compatible_decodings
from hf_argen.auto import new_processor
from hf_argen.generation.schedules import hidden_after_steps

from ..helpers.enumerator import Enumerator, assert_same_distribution
from ..helpers.goldens import assert_close, assert_same_image, golden
from ..helpers.tiny import maskgit_vq_config, tiny_mar, tiny_maskgit

SCHEDULES = {"constant": "constant", "linear": "linear"}


@pytest.fixture(scope="module", params=["l32_like", "s128_like"])
def case(request):
    return golden("titok", request.param)


@pytest.fixture(scope="module")
def model(case):
    return case.convert()


def options_of(run):
    """A recorded run in our words."""
    power = {"type": "power_cosine", "power": run.get("guidance_scale_pow", 3.0)}
    return {
        "guidance_scale": run["guidance_scale"],
        "guidance_schedule": SCHEDULES.get(run["guidance_decay"], power),
        "return_dict_in_generate": True,
        "decoding": Masked(
            num_steps=run["num_sample_steps"],
            order="confidence",
            schedule="arccos",
            randomize_temperature=run["randomize_temperature"],
            softmax_temperature_annealing=run["softmax_temperature_annealing"],
        ),
    }


def watched(model, seen):
    """Notes what the transformer is given in every step."""
    return model.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))


@pytest.mark.parametrize("name", ["greedy", "sampled", "alt", "const"])
def test_the_authors_seeds_give_their_tokens(case, model, name):
    """And the same sets of tokens become known in every step."""
    run, tensors, seen = case.case["generation"][name], case.tensors, []
    torch.manual_seed(run["seed"])
    hook = watched(model, seen)
    output = model.generate(tensors["labels"], do_sample=True, **options_of(run))
    hook.remove()
    assert torch.equal(output.sequences, tensors[f"{name}_tokens"])
    assert output.steps == output.forward_calls == run["num_sample_steps"]
    if f"{name}_step_ids" in tensors:
        rows = len(tensors["labels"])
        assert torch.equal(torch.stack([ids[:rows] for ids in seen]), tensors[f"{name}_step_ids"])
        assert_same_image(output.images, tensors[f"{name}_image"].clamp(0, 1))


def test_greedy_tokens(case, model):
    """Without sampling no noise is drawn, whatever its factor."""
    options = options_of({**case.case["generation"]["greedy"], "randomize_temperature": 3.0})
    state = torch.get_rng_state()
    output = model.generate(case.tensors["labels"], do_sample=False, **options)
    assert torch.equal(output.sequences, case.tensors["greedy_tokens"])
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_of_every_token(case, model):
    """Each from the step in which it became known; without guidance the recorded conditional ones."""
    labels = case.tensors["labels"]
    seen = []
    hook = watched(model, seen)
    output = model.generate(
        labels,
        do_sample=False,
        guidance_scale=0.0,
        output_logits=True,
        return_dict_in_generate=True,
        decoding=Masked(num_steps=4, order="raster"),
    )
    hook.remove()
    assert torch.equal(output.logits.argmax(dim=-1), output.sequences)
    tokens = model.config.num_image_tokens
    known = [tokens - hidden for hidden in (tokens, *hidden_after_steps(tokens, 4, "cosine"))]
    with torch.no_grad():
        for step, ids in enumerate(seen):
            new = slice(known[step], known[step + 1])
            mask = ids == model.model.mask_id
            assert (mask == (torch.arange(tokens) >= known[step])).all()
            given = ids.masked_fill(mask, 0)
            expected = model(input_ids=given, class_labels=labels, mask=mask).logits
            assert_close(output.logits[:, new], expected[:, new])


# The distribution


def brute_force(model, sizes, order, weight, top_k):
    """Probability of every picture, by following all choices in the plainest way."""
    capacity, vocab = model.config.num_image_tokens, model.config.vocab_size
    mask_id, found = model.model.mask_id, {}

    def probabilities(ids):
        rows = torch.tensor([ids, ids])
        condition = model.condition(class_labels=torch.tensor([2, -1]))
        both = model.head(model.model(rows, condition).last_hidden_state).double()
        logits = both[1] + weight * (both[0] - both[1])
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        return logits, logits.masked_fill(logits < least, -torch.inf).softmax(dim=-1)

    def follow(ids, step, probability, permutation):
        if step == len(sizes):
            found[tuple(ids)] = found.get(tuple(ids), 0.0) + probability
            return
        logits, chances = probabilities(ids)
        hidden = [place for place in range(capacity) if ids[place] == mask_id]
        drawn = hidden
        if order == "random":
            left = [place for place in permutation if ids[place] == mask_id]
            drawn = left[: sizes[step]]
        for values in itertools.product(range(vocab), repeat=len(drawn)):
            chance, sure = probability, []
            for place, value in zip(drawn, values, strict=True):
                chance *= chances[place, value].item()
                sure.append((-logits[place, value].item(), place, value))
            if chance == 0:
                continue
            kept = sorted(sure)[: sizes[step]] if order == "confidence" else sure
            after = list(ids)
            for _, place, value in kept:
                after[place] = value
            follow(after, step + 1, chance, permutation)

    permutations = list(itertools.permutations(range(capacity))) if order == "random" else [None]
    with torch.no_grad():
        for permutation in permutations:
            follow([mask_id] * capacity, 0, 1 / len(permutations), permutation)
    return found


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_distribution_by_all_branches(order):
    """Sets of tokens in both orders, with guidance and top-k: every branch followed with its weight."""
    torch.manual_seed(3)
    tokenizer = maskgit_vq_config(codebook_size=3, grid_size=[1, 3])
    model = tiny_maskgit(image_tokenizer_config=tokenizer)
    sizes = [1, 2]
    assert hidden_after_steps(3, 2, "cosine") == [2, 0]
    decoding = Masked(num_steps=2, order=order)
    options = {"guidance_scale": 1.5, "guidance_schedule": "constant", "top_k": 2, "do_sample": True}

    def run():
        return tuple(model.generate([2], decoding=decoding, **options)[0].tolist())

    found = Enumerator(most_runs=100_000).distribution(run)
    assert len(found) > 6
    assert_same_distribution(found, brute_force(model, sizes, order, 2.5, top_k=2))
    with pytest.raises(AssertionError):
        assert_same_distribution(found, brute_force(model, sizes, order, 1.0, top_k=2), tolerance=1e-3)


def test_noise_falls_to_nothing():
    """The last step takes the likeliest tokens; with one step there is no noise at all."""
    model = tiny_maskgit()
    options = {
        "class_labels": [1, 2],
        "guidance_scale": 1.0,
        "decoding": Masked(1, "confidence", "arccos", 50.0),
    }
    one = model.generate(**options, do_sample=True)
    assert torch.equal(one, model.generate(**options, do_sample=False))
    options["decoding"] = Masked(5, "confidence", "arccos", 50.0)
    several = [model.generate(**options, do_sample=True) for _ in range(3)]
    assert not all(torch.equal(several[0], other) for other in several[1:])


# Keeping a part


def test_kept_tokens_stay():
    """Rows of unequal numbers of kept tokens; the one that keeps fewest is drawn as it would be alone."""
    model = tiny_maskgit()
    source, keep = torch.randint(16, (2, 5)), torch.zeros(2, 1, 5)
    keep[0, 0, :3], keep[1, 0, 4] = 1, 1
    fixed = keep[:, 0].bool()
    for order in ("random", "confidence"):
        options = {"do_sample": False, "guidance_scale": 2.0, "decoding": Masked(num_steps=3, order=order)}
        options["guidance_schedule"] = "constant"
        together = model.generate([1, 2], input_ids=source, keep_mask=keep, **options)
        assert torch.equal(together[fixed], source[fixed])
        alone = model.generate([2], input_ids=source[1:], keep_mask=keep[1:], **options)
        assert torch.equal(together[1:], alone)
    with pytest.raises(ValueError, match="of 1x5 tokens, which are no places of the picture"):
        model.generate([1], input_ids=source[:1], keep_mask=torch.ones(8, 8))


def test_masks_of_pixels_say_nothing_of_one_row():
    model = tiny_maskgit()
    draw = pipeline("image-inpainting", model=model, processor=new_processor(model.config))
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="The tokens of this model are no places of the picture"):
        draw(picture, picture.convert("L"))


def test_pictures_on_the_way():
    """Hidden places show what was drawn for them last."""
    model = tiny_maskgit()
    seen = []
    streamer = type("Steps", (), {"put": lambda self, value: seen.append(value), "end": lambda self: None})()
    output = model.generate([1], do_sample=False, streamer=streamer, return_dict_in_generate=True)
    assert len(seen) == output.steps == 5 and torch.equal(seen[-1], output.images)
    assert seen[0].shape == (1, 3, 8, 8)


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoding": Masked(num_steps=6)}, "num_steps is 6; this model has 5 tokens"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a number above 0"),
        ({"top_k": 17}, "top_k is 17; it must lie in"),
        ({"max_new_tokens": 4}, "draws whole pictures of 5 tokens"),
        (
            {"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])},
            "NoRepeatNGramLogitsProcessor may read the tokens before a token",
        ),
        ({"stopping_criteria": StoppingCriteriaList([lambda ids, scores: True])}, "reads a sequence of ids"),
        ({"class_labels": [9]}, "class label 9 is out of range"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_maskgit().generate(**{"class_labels": [1], **options})


@pytest.mark.parametrize("noise", [-1.0, "much", float("inf")])
def test_bad_noise(noise):
    with pytest.raises(ValueError, match=r"randomize_temperature is .*; it must be a number, 0 or above"):
        Masked(randomize_temperature=noise)


def test_what_vectors_have_not():
    for option in ({"randomize_temperature": 2.0}, {"softmax_temperature_annealing": True}):
        with pytest.raises(ValueError, match=f"have no logits; leave {next(iter(option))} out"):
            tiny_mar().generate([1], decoding=Masked(**option))
    assert compatible_decodings(tiny_maskgit()) == ["masked"]


def test_damaged_weights():
    model = tiny_maskgit()
    with torch.no_grad():
        model.head.out_proj.weight[3] = torch.nan
    with pytest.raises(ValueError, match="produced NaN or infinite logits"):
        model.generate([1])
