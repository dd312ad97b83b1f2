"""Relaxed acceptance: recorded values, the bound, exactness without relaxation, drafters, bad input."""

import numpy as np
import pytest
import torch

import hf_argen
from hf_argen import RelaxedAcceptance
from hf_argen.generation.decoding.speculative.relaxation import (
    Relaxation,
    nearest_by_distance,
    nearest_by_table,
)
from hf_argen.generation.sampling import acceptance

from ..helpers.enumerator import Enumerator, assert_same_distribution
from ..helpers.goldens import assert_close, golden
from ..helpers.language_models import KINDS, language_model, prompts
from ..helpers.tiny import NEXT_TOKEN_FAMILIES, tiny_next_token

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}


@pytest.fixture(params=NEXT_TOKEN_FAMILIES)
def family(request):
    return request.param


def models(family, codes=16, grid=(4, 4)):
    """A model and a small one of the same family."""
    torch.manual_seed(3)
    return tuple(tiny_next_token(family, codes, grid, **sizes) for sizes in ({}, SMALL))


# The rule


def warped(logits, setting):
    """What the authors' processors leave of logits, as probabilities."""
    logits = logits / setting["temperature"]
    if 0 < setting["top_p"] < 1:
        order = logits.argsort(descending=True)
        mass = logits[order].softmax(-1).cumsum(-1)
        dropped = order[1:][mass[:-1] > setting["top_p"]]
        logits = logits.index_fill(0, dropped, -torch.inf)
    if setting["top_k"]:
        logits = logits.masked_fill(logits < logits.topk(setting["top_k"]).values[-1], -torch.inf)
    return logits.softmax(-1)


def rule_of(case, k, bound):
    nearest = nearest_by_table(case.tensors["nearest_indices"])
    options = {"delta": bound} if bound <= 1 else {"delta": 0.1, "factor": bound}
    return Relaxation(nearest, k, **options)


def test_neighbours_of_a_codebook():
    case = golden("lantern", "verify_a")
    found = nearest_by_distance(case.tensors["codebook"])(torch.arange(64), 63)
    assert torch.equal(found, case.tensors["nearest_indices"])
    table = torch.from_numpy(np.load(case.path / "top_63_indices.npy").astype(np.int64))
    assert torch.equal(nearest_by_table(table)(torch.arange(64), 7), found[:, :7])


def test_recorded_acceptance_without_draft_probability():
    """The first candidate of every dynamic tree."""
    case = golden("lantern", "verify_a")
    for trial in range(4):
        for i, setting in enumerate(case.case["settings"]):
            probs = warped(case.tensors[f"dyn{trial}/logits"][0, 0], setting)
            token = case.tensors[f"dyn{trial}/candidates"][0, 1]
            rule = rule_of(case, setting["lantern_k"], setting["lantern_delta"])
            value, _ = rule.relaxed(probs[None], token[None])
            assert_close(value, case.tensors[f"dyn{trial}/set{i}/reject_accept_prob"][:1])
            assert_close(probs[token].view(1), case.tensors[f"dyn{trial}/set{i}/plain_accept_prob"][:1])


def test_recorded_acceptance_against_a_draft():
    """The first candidate of every static tree."""
    case = golden("lantern", "verify_a")
    setting = case.case["static"]
    rule = rule_of(case, setting["lantern_k"], setting["lantern_delta"])
    for trial in range(4):
        tensors = {
            name.split("/")[1]: t for name, t in case.tensors.items() if name.startswith(f"static{trial}/")
        }
        probs = warped(tensors["node_logits"][0], setting)
        token, own = tensors["candidates"][0, 1], tensors["candidates_cond_prob"][0, 1]
        value, _ = rule.relaxed(probs[None], token[None])
        assert_close(acceptance(value, own), tensors["reject_accept_prob"][:1].clamp(max=1))


def pairs(count=30, vocab=12):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, count, vocab, generator=generator)
    return zip(*logits.softmax(dim=-1), strict=True)


@pytest.mark.parametrize(
    "options", [{"delta": 0.0}, {"delta": 0.1}, {"delta": 0.5}, {"delta": 1.0}, {"delta": 0.0, "factor": 3.0}]
)
def test_the_bound(options):
    """A token is kept at most as often as p + delta, or factor * p, says; without either it is speculative sampling."""
    codes = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    rule = Relaxation(nearest_by_distance(codes), k=6, **options)
    tokens = torch.arange(12)
    gained = 0.0
    for p, q in pairs():
        value, has_neighbours = rule.relaxed(p.expand(12, -1), tokens)
        kept = q * acceptance(value, q)
        limit = p + options["delta"] if rule.factor is None else rule.factor * p
        assert (value <= limit + 1e-6).all() and (kept <= limit + 1e-6).all()
        gained += float(kept.sum() - torch.minimum(p, q).sum())
        rest = rule.remaining(p.expand(12, -1), q.expand(12, -1), tokens, has_neighbours)
        assert torch.allclose(rest.sum(dim=-1), torch.ones(12), atol=1e-5)
        if rule.is_off:
            assert torch.allclose(kept + (1 - kept.sum()) * rest[0], p, atol=1e-6)
    assert (gained > 0.1) == (not rule.is_off)


# The decoding


def test_without_relaxation_the_distribution_is_the_plain_one(family):
    model, drafter = models(family, codes=2, grid=(1, 3))

    def distribution(decoding, **options):
        def run():
            return tuple(
                model.generate([0, 3], decoding=decoding, do_sample=True, **options).flatten().tolist()
            )

        return Enumerator().distribution(run)

    decoding = RelaxedAcceptance(drafter, draft_length=1, delta=0.0)
    expected = distribution("next_token", guidance_scale=2.0)
    assert_same_distribution(distribution(decoding, guidance_scale=2.0), expected)
    assert len(expected) == 64


def test_longer_drafts(family):
    model, drafter = models(family, codes=2, grid=(1, 4))

    def distribution(decoding):
        return Enumerator().distribution(
            lambda: tuple(model.generate([1], decoding=decoding, do_sample=True)[0].tolist())
        )

    found = distribution(RelaxedAcceptance(drafter, draft_length=3, delta=0.0))
    assert_same_distribution(found, distribution("next_token"))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_language_models(kind):
    model = language_model(kind)
    drafter = language_model(
        kind, **({"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1, "layer_types": None})
    )
    for options in ({}, {"repetition_penalty": 1.3}, {"guidance_scale": 1.6}):
        inputs = {**prompts(), "max_new_tokens": 12, "do_sample": False, **options}
        expected = model.generate(**inputs)
        assert torch.equal(
            hf_argen.generate(model, RelaxedAcceptance(drafter, delta=0.0), **inputs), expected
        )


def test_a_model_that_drafts_for_itself(family):
    """Every draft is accepted, so a call of the model gains all of them and one more."""
    model, _ = models(family)
    output = model.generate(
        [0, 1],
        decoding=RelaxedAcceptance(model, draft_length=4, delta=0.0),
        do_sample=True,
        return_dict_in_generate=True,
    )
    assert output.accept_lengths.tolist() == [[5, 5, 5]] * 2
    assert output.forward_calls == 2 + 3 + 3 * 4


def test_more_relaxation_accepts_more(family):
    model, drafter = models(family)
    gains = []
    for delta in (0.0, 0.02, 0.3):
        output = model.generate(
            list(range(5)) * 6,
            decoding=RelaxedAcceptance(drafter, delta=delta),
            do_sample=True,
            temperature=3.0,
            generator=torch.Generator().manual_seed(0),
            return_dict_in_generate=True,
        )
        gains.append(output.accept_lengths[output.accept_lengths > 0].float().mean().item())
    assert gains[0] < gains[1] < gains[2]


def test_greedy_relaxation_keeps_what_becomes_the_best(family):
    """With all probability on loan every draft is the best one: after its first token the picture is the drafter's."""
    model, drafter = models(family)
    ids = model.generate(
        [0, 2], decoding=RelaxedAcceptance(drafter, draft_length=15, delta=1.0), do_sample=False
    )
    first = torch.zeros(4, 4)
    first[0, 0] = 1
    plain = model.generate([0, 2], do_sample=False)
    expected = drafter.generate([0, 2], input_ids=plain, keep_mask=first, do_sample=False)
    assert torch.equal(ids[:, :-1], expected[:, :-1])  # the last token is not drafted
    assert not torch.equal(ids, plain)


def test_stored_by_name(family, tmp_path):
    model, drafter = models(family)
    with pytest.raises(ValueError, match="The drafter was never saved or loaded"):
        RelaxedAcceptance(drafter).to_dict()
    drafter.save_pretrained(tmp_path)
    decoding = RelaxedAcceptance(type(drafter).from_pretrained(tmp_path), delta=0.2)
    stored = decoding.to_dict()
    assert stored == {"type": "relaxed_acceptance", "drafter": str(tmp_path), "delta": 0.2}
    options = {"do_sample": True, "guidance_scale": 2.0}
    one, other = (
        model.generate([0], decoding=form, generator=torch.Generator().manual_seed(1), **options)
        for form in (decoding, stored)
    )
    assert torch.equal(one, other)


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"delta": 1.5}, r"delta is 1.5; .* must lie in \[0, 1\].*given as factor"),
        ({"delta": -0.1}, "delta is -0.1"),
        ({"factor": 0.5}, "factor is 0.5"),
        ({"k": -1}, "k is -1"),
        ({"draft_length": 0}, "draft_length is 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RelaxedAcceptance(**options)


def test_bad_drafters_and_codebooks(family, tmp_path):
    model, _ = models(family)
    _, other_codes = models(family, codes=8)
    _, other_grid = models(family, grid=(2, 4))
    for decoding, message in (
        (RelaxedAcceptance(), "needs a drafter"),
        (RelaxedAcceptance(other_codes), "draws from 8 tokens, the model from 16"),
        (RelaxedAcceptance(other_grid), r"draws pictures of \[\(2, 4\)\] tokens"),
        (RelaxedAcceptance(model, neighbours="none.npy"), "'none.npy' does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate([0], decoding=decoding)
    table = tmp_path / "table.npy"
    np.save(table, np.zeros((8, 7), dtype=np.uint16))
    with pytest.raises(
        ValueError, match="needs 16 rows of at least 15 of its codes: it belongs to another codebook"
    ):
        model.generate([0], decoding=RelaxedAcceptance(model, neighbours=str(table)))
    codes = model.image_tokenizer.quantizer.codes()
    nearest = nearest_by_distance(codes)(torch.arange(16), 15)
    np.save(table, nearest.numpy().astype(np.uint16))
    options = {"do_sample": True, "return_dict_in_generate": False}
    one, other = (
        model.generate([0], decoding=decoding, generator=torch.Generator().manual_seed(2), **options)
        for decoding in (RelaxedAcceptance(model), RelaxedAcceptance(model, neighbours=str(table)))
    )
    assert torch.equal(one, other)
