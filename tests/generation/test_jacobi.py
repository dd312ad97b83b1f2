"""Speculative Jacobi decodings: distributions, bounds, recorded values, language models, bad input."""

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_argen
from hf_argen import GroupedSpeculative, MaximalCouplingJacobi, SpeculativeJacobi
from hf_argen.generation.decoding.base import Request
from hf_argen.generation.decoding.speculative_jacobi import Drafts
from hf_argen.generation.sampling import acceptance, one_hot, residual

from ..helpers.enumerator import Enumerator, assert_same_distribution
from ..helpers.goldens import golden
from ..helpers.language_models import KINDS, language_model, prompts
from ..helpers.tiny import NEXT_TOKEN_FAMILIES, tiny_next_token

LOSSLESS = [SpeculativeJacobi, MaximalCouplingJacobi]


@pytest.fixture(params=NEXT_TOKEN_FAMILIES)
def family(request):
    return request.param


def small_model(family, codes=2, tokens=3):
    torch.manual_seed(3)
    return tiny_next_token(family, codes, grid=(1, tokens))


def distribution(model, decoding, labels, **options):
    def run():
        return tuple(model.generate(labels, decoding=decoding, do_sample=True, **options).flatten().tolist())

    return Enumerator().distribution(run)


@pytest.mark.parametrize("initialization", ["random", "horizontal"])
@pytest.mark.parametrize("decoding_class", LOSSLESS)
def test_distribution_with_a_window_of_three(family, decoding_class, initialization):
    """Drafts are carried from call to call, accepted, rejected and redrawn."""
    model = small_model(family, tokens=4 if initialization == "horizontal" else 3)
    decoding = decoding_class(window=3, initialization=initialization)
    found = distribution(model, decoding, [1], guidance_scale=2.0)
    assert_same_distribution(found, distribution(model, "next_token", [1], guidance_scale=2.0))
    assert len(found) in (8, 16)


@pytest.mark.parametrize("decoding_class", LOSSLESS)
def test_distribution_of_unequal_rows(family, decoding_class):
    """Two rows that gain different numbers of tokens in a call are as independent as alone."""
    model = small_model(family)
    decoding = decoding_class(window=2, initialization="horizontal")
    found = distribution(model, decoding, [0, 3], guidance_scale=2.0)
    assert_same_distribution(found, distribution(model, "next_token", [0, 3], guidance_scale=2.0))
    assert len(found) == 64


def test_coupled_drafts_gain_more(family):
    """Mean tokens a call over many pictures."""
    model = tiny_next_token(family, grid=(6, 6))
    labels = [i % 5 for i in range(48)]
    gains = []
    for decoding in (SpeculativeJacobi(window=12), MaximalCouplingJacobi(window=12)):
        output = model.generate(
            labels,
            decoding=decoding,
            do_sample=True,
            temperature=8.0,
            generator=torch.Generator().manual_seed(0),
            return_dict_in_generate=True,
        )
        gained = output.accept_lengths[output.accept_lengths > 0].float()
        gains.append(gained.mean().item())
    assert gains[1] > gains[0] + 0.1


# What accepted and redrawn tokens follow, one place at a time


def distributions(count=20, vocab=6):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, count, vocab, generator=generator)
    return zip(*logits.softmax(dim=-1), strict=True)


def test_speculative_sampling_gives_the_target():
    for p, q in distributions():
        kept = q * acceptance(p, q)
        assert torch.allclose(kept + (1 - kept.sum()) * residual(p, q), p, atol=1e-6)
    assert torch.equal(residual(p, p), p)


class Tokens(torch.nn.Module):
    """Stands for a model: input embeddings alone."""

    def __init__(self, vocab, scale):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab, 3)
        torch.nn.init.normal_(self.embedding.weight, std=scale)

    def get_input_embeddings(self):
        return self.embedding


def request_of(model):
    fields = dict.fromkeys(
        ("predictor", "inputs", "generation_config", "logits_processor", "stopping_criteria")
    )
    return Request(model=model, **fields)


def shares(decoding, p, q, model):
    """(vocab,) how often each token is drafted and kept, and p of its group."""
    tokens = torch.arange(len(p))[None]
    drafts = Drafts(tokens, q.expand(1, len(p), -1), [len(p)])
    target = p.expand(1, len(p), -1)
    chance = decoding.acceptance(target, drafts, request_of(model))[0]
    group, is_member = decoding.groups(target, tokens, request_of(model))
    own = (group == tokens.unsqueeze(-1)).any(dim=-1)
    assert own.all()
    return q * chance, (target.gather(-1, group) * is_member).sum(dim=-1)[0]


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_the_bound_of_grouped_verification(size):
    """A token is kept at most as often as the model draws its group, which is group_size * (p + gap) at most."""
    model, gap = Tokens(6, 0.2), 0.2
    for limit in (None, 0.1):
        decoding = GroupedSpeculative(group_size=size, max_probability_gap=gap, max_distance=limit)
        relaxed = 0
        for p, q in distributions():
            kept, group = shares(decoding, p, q, model)
            assert (kept <= group + 1e-6).all() and (group <= size * (p + gap) + 1e-6).all()
            exact = q * acceptance(p, q)
            relaxed += int((kept > exact + 1e-6).any())
            if size == 1:
                assert torch.equal(kept, exact)
        assert (relaxed > 0) == (size > 1 and limit is None) or limit is not None


def test_groups_of_one_are_speculative_jacobi(family):
    model = small_model(family)
    found = distribution(model, GroupedSpeculative(window=2, group_size=1), [1], guidance_scale=2.0)
    assert_same_distribution(found, distribution(model, "next_token", [1], guidance_scale=2.0))


def test_larger_groups_take_fewer_calls(family):
    model = tiny_next_token(family)
    calls = []
    for size in (1, 8, 16):
        decoding = GroupedSpeculative(window=8, group_size=size, max_distance=None, max_probability_gap=1.0)
        output = model.generate(
            [0, 1, 2, 3],
            decoding=decoding,
            do_sample=True,
            temperature=2.0,
            generator=torch.Generator().manual_seed(0),
            return_dict_in_generate=True,
        )
        calls.append(output.forward_calls)
    assert calls[0] > calls[1] > calls[2]


# Recorded passes of the authors' code


@pytest.mark.parametrize("name", ["llama_a", "lumina_a", "llamagen_c2i_a"])
def test_recorded_acceptance(name):
    """Which drafts pass, given the probabilities and uniforms of every pass."""
    tensors = golden("sjd", name).tensors
    uniform, target, draft = (
        tensors[f"spec/{field}"]
        for field in ("uniform_at_draft_token", "target_prob_of_draft_token", "draft_prob_of_draft_token")
    )
    checked = 0
    for i, accepted in enumerate(tensors["spec/accepted_per_pass"].tolist()):
        tried = uniform[i] >= 0
        if tensors["spec/is_single_token_pass"][i] or not tried.any():
            continue
        passes = uniform[i][tried] < acceptance(target[i][tried], draft[i][tried])
        assert passes.long().cumprod(0).sum() + 1 == accepted
        checked += 1
    assert checked > 5


def test_recorded_greedy_output():
    case = golden("sjd", "llama_a")
    model = LlamaForCausalLM.from_pretrained(case.path / "target")
    prompt, expected = case.tensors["prompt_ids"], case.tensors["greedy/output_ids"]
    options = {
        "do_sample": False,
        "max_new_tokens": expected.shape[1] - prompt.shape[1],
        "eos_token_id": None,
    }
    found = hf_argen.generate(model, SpeculativeJacobi(window=8), input_ids=prompt, **options)
    assert torch.equal(found, expected)


# Language models


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_language_models(kind):
    """Padding, processors that read the history, end of sequence, guidance, rows of unequal length."""
    model = language_model(kind)
    for options in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {"guidance_scale": 1.6}):
        inputs = {**prompts(), "max_new_tokens": 14, "do_sample": False, **options}
        expected = model.generate(**inputs)
        for decoding in (
            SpeculativeJacobi(window=5),
            MaximalCouplingJacobi(window=4, initialization="horizontal"),
        ):
            assert torch.equal(hf_argen.generate(model, decoding, **inputs), expected), options


def test_language_model_distribution():
    model = language_model(vocab_size=6, eos_token_id=3)
    inputs = {"input_ids": torch.tensor([[4, 5]]), "max_new_tokens": 3, "do_sample": True, "top_k": 3}

    def run(decoding):
        return tuple(hf_argen.generate(model, decoding, **inputs)[0].tolist())

    found, expected = (
        Enumerator().distribution(lambda decoding=decoding: run(decoding))
        for decoding in (SpeculativeJacobi(window=2, initialization="horizontal"), "next_token")
    )
    assert_same_distribution(found, expected)
    assert len(expected) > 5


# Options


def test_output_tells_what_was_gained(family):
    model = tiny_next_token(family)
    output = model.generate(
        [0, 1],
        decoding="speculative_jacobi",
        do_sample=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.accept_lengths.shape == (2, output.forward_calls - 1)
    assert output.accept_lengths.sum(dim=1).tolist() == [15, 15]  # the first token comes from the prompt
    assert output.steps == output.forward_calls and output.logits.shape == (2, 16, 16)


def test_logits_are_those_of_the_sequence(family):
    model = tiny_next_token(family)
    options = {"do_sample": True, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate([0, 1, 2], decoding=SpeculativeJacobi(window=5), **options)
    expected = model(input_ids=output.sequences, class_labels=torch.tensor([0, 1, 2])).logits
    assert torch.allclose(output.logits, expected, atol=1e-3)


def test_initial_drafts(family):
    model = tiny_next_token(family)
    for initialization in ("random", "horizontal", "vertical"):
        decoding = SpeculativeJacobi(window=6, initialization=initialization)
        ids = model.generate([0, 1, 2], decoding=decoding, do_sample=False)
        assert torch.equal(ids, model.generate([0, 1, 2], do_sample=False))


def test_giving_up(family):
    """A request that gains too little goes on token by token."""
    model = tiny_next_token(family, grid=(8, 8))
    options = {"do_sample": True, "return_dict_in_generate": True, "temperature": 5.0}
    gains = model.generate(
        [0], decoding=SpeculativeJacobi(window=4, give_up_below=4.0), **options
    ).accept_lengths
    assert (gains[0, :16] > 1).any() and (gains[0, 16:] == 1).all()


BAD = [
    (lambda: SpeculativeJacobi(window=0), "window is 0; it must be at least 1"),
    (lambda: SpeculativeJacobi(initialization="left"), "must be one of random, horizontal, vertical"),
    (lambda: SpeculativeJacobi(give_up_below=0.5), "give_up_below is 0.5"),
    (lambda: GroupedSpeculative(group_size=0), "group_size is 0"),
    (lambda: GroupedSpeculative(max_probability_gap=2.0), r"must lie in \[0, 1\]"),
    (lambda: GroupedSpeculative(max_distance=-1.0), "max_distance is -1.0"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message for _, message in BAD])
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_requests(family):
    model = tiny_next_token(family)
    with pytest.raises(ValueError, match="window is 17; a picture of this model has 16 tokens"):
        model.generate([0], decoding=SpeculativeJacobi(window=17))
    ids = torch.zeros(1, 16, dtype=torch.long)
    with pytest.raises(ValueError, match="SpeculativeJacobi cannot keep a part of a source picture"):
        model.generate([0], input_ids=ids, keep_mask=torch.ones(4, 4), decoding="speculative_jacobi")
    with pytest.raises(ValueError, match="'vertical' needs a model of pictures"):
        hf_argen.generate(
            language_model(), SpeculativeJacobi(initialization="vertical"), **prompts(), max_new_tokens=2
        )


def test_one_hot():
    like = torch.zeros(2, 3)
    pairs = itertools.product(range(3), repeat=2)
    assert all(one_hot(torch.tensor(pair), like).argmax(-1).tolist() == list(pair) for pair in pairs)
