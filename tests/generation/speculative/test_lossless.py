"""Draft and verify does not change what the model says: every rule, tree and drafter against plain decoding."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

import hf_argen
from hf_argen import (
    Chain,
    DraftModel,
    DynamicTree,
    ExactMatch,
    IndependentSequences,
    NextToken,
    NGram,
    OptTree,
    RejectionSampling,
    SpecTr,
    SpeculativeDecoding,
    StaticTree,
    TypicalAcceptance,
)

from ...helpers.enumerator import Enumerator, assert_same_distribution
from ...helpers.language_models import EOS, KINDS, language_model, prompts
from ...helpers.table_model import TableModel, distribution, run

TREES = {
    "chain": Chain(2),
    "chain that ends early": Chain(2, confidence=0.4),
    "two chains": IndependentSequences(2, 2),
    "three chains": IndependentSequences(3, 1),
    "drawn static": StaticTree([[0], [1], [0, 0]]),
    "static": StaticTree([[0], [1], [0, 0], [1, 0]], draw=False),
    "dynamic": DynamicTree(total_token=6, depth=1, top_k=2),
    "opt": OptTree(nodes=3, threshold=0.05, max_depth=4),
}


def plain(model, prompt, tokens, processors=()):
    return distribution(NextToken(), model, prompt, tokens, processors)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_rejection_sampling_on_every_tree(name, drafter):
    model, other = TableModel(3, 0), TableModel(3, 1)
    part = DraftModel(other) if drafter == "model" else NGram()
    decoding = SpeculativeDecoding(part, TREES[name], RejectionSampling())
    prompt = [[0, 1, 2, 0, 1]]
    assert_same_distribution(distribution(decoding, model, prompt, 3), plain(model, prompt, 3))


@pytest.mark.parametrize("name", ["chain", "chain that ends early", "two chains", "three chains"])
@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_spectr(name, drafter):
    model, other = TableModel(3, 0), TableModel(3, 1)
    part = DraftModel(other) if drafter == "model" else NGram()
    decoding = SpeculativeDecoding(part, TREES[name], SpecTr())
    prompt = [[0, 1, 2, 0, 1]]
    assert_same_distribution(distribution(decoding, model, prompt, 3), plain(model, prompt, 3))


@pytest.mark.parametrize("name", ["chain", "two chains", "drawn static", "opt"])
def test_exact_match(name):
    model, other = TableModel(2, 0), TableModel(2, 1)
    tree = {"opt": OptTree(2, 0.05, 4), "two chains": IndependentSequences(2, 1)}.get(name, TREES[name])
    decoding = SpeculativeDecoding(DraftModel(other), tree, ExactMatch())
    assert_same_distribution(distribution(decoding, model, [[0, 1]], 3), plain(model, [[0, 1]], 3))


@pytest.mark.parametrize("name", ["chain", "drawn static", "dynamic"])
def test_rows_that_accept_unequal_numbers(name):
    """The joint distribution of two rows, with processors that look at the scores and at the row's own tokens."""
    model, other = TableModel(2, 3), TableModel(2, 4)
    processors = [TemperatureLogitsWarper(1.3), RepetitionPenaltyLogitsProcessor(1.2)]
    tree = {"chain": Chain(1), "drawn static": StaticTree([[0], [1]]), "dynamic": DynamicTree(3, 0, 2)}[name]
    prompt = [[0, 1], [1, 1]]
    part = DraftModel(other) if name != "dynamic" else NGram()
    found = distribution(SpeculativeDecoding(part, tree), model, prompt, 3, processors)
    assert_same_distribution(found, plain(model, prompt, 3, processors))


def test_top_k_leaves_fewer_tokens_than_children():
    model, other = TableModel(4, 5), TableModel(4, 6)
    processors = [TopKLogitsWarper(2)]
    for tree in (StaticTree([[0], [1], [2]]), IndependentSequences(2, 1)):
        found = distribution(SpeculativeDecoding(DraftModel(other), tree), model, [[0, 1]], 2, processors)
        assert_same_distribution(found, plain(model, [[0, 1]], 2, processors))


def test_a_wrong_rule_is_found_out():
    """The proof can fail: typical acceptance is relaxed."""
    model, other = TableModel(3, 0), TableModel(3, 1)
    found = distribution(
        SpeculativeDecoding(DraftModel(other), Chain(1), TypicalAcceptance()), model, [[0, 1]], 3
    )
    with pytest.raises(AssertionError):
        assert_same_distribution(found, plain(model, [[0, 1]], 3), tolerance=0.02)


def test_better_rules_keep_more():
    """More candidates at a place are kept more often; SpecTr and recursive rejection beat a single draft."""
    model, other = TableModel(8, 0), TableModel(8, 1)

    def mean(tree, rule):
        torch.manual_seed(0)
        prompt = torch.randint(0, 8, (60, 2)).tolist()
        lengths = run(SpeculativeDecoding(DraftModel(other), tree, rule), model, prompt, 12).details[
            "accept_lengths"
        ]
        return lengths[lengths > 0].float().mean().item()

    single = mean(Chain(1), RejectionSampling())
    for tree, rule in (
        (IndependentSequences(4, 1), RejectionSampling()),
        (IndependentSequences(4, 1), SpecTr()),
        (StaticTree([[0], [1], [2], [3]]), RejectionSampling()),
    ):
        assert mean(tree, rule) > single + 0.1


def test_unequal_rows_of_a_real_model():
    """Two rows with left padding, guidance and top-k on a transformer; drafts are copied, rows accept unequal numbers."""
    fields = {
        "vocab_size": 3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "num_hidden_layers": 1,
    }
    model = language_model(**fields)
    model.generation_config.eos_token_id = None
    inputs = {
        "input_ids": torch.tensor([[0, 1, 2, 1], [1, 2, 1, 1]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    options = {"do_sample": True, "top_k": 2, "guidance_scale": 1.4, "max_new_tokens": 2}

    def found(decoding):
        return Enumerator().distribution(
            lambda: tuple(hf_argen.generate(model, decoding, **inputs, **options)[:, 4:].flatten().tolist())
        )

    assert_same_distribution(found(SpeculativeDecoding(tree=Chain(1))), found("next_token"))


# Greedy text is that of plain generate


def many_prompts(count=20, length=7):
    """Prompts of unequal length in which tokens repeat, padded on the left."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(EOS + 1, 16, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, : row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def small(kind):
    return language_model(
        kind, **({"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1, "layer_types": None})
    )


GREEDY = {
    "model": SpeculativeDecoding(None, Chain(3)),
    "ngram": SpeculativeDecoding(NGram(), Chain(4)),
    "chains": SpeculativeDecoding(None, IndependentSequences(3, 2)),
    "medusa": SpeculativeDecoding(None, StaticTree()),
    "dynamic": SpeculativeDecoding(None, DynamicTree(12, 2, 3)),
    "opt": SpeculativeDecoding(NGram(), OptTree(8, 0.1, 4)),
    "match": SpeculativeDecoding(None, StaticTree([[0], [1], [0, 0]]), ExactMatch()),
    "spectr": SpeculativeDecoding(None, IndependentSequences(2, 2), SpecTr()),
    "typical": SpeculativeDecoding(None, Chain(2), TypicalAcceptance()),
}


@pytest.fixture(scope="module")
def plain_texts():
    """A model, and its own greedy text for twenty prompts, one by one and four at a time: (inputs, ids) of each batch."""
    model = language_model("llama")
    inputs, found = many_prompts(), []
    for size in (1, 4):
        for start in range(0, 20, size):
            batch = {key: value[start : start + size] for key, value in inputs.items()}
            found.append((batch, model.generate(**batch, max_new_tokens=10, do_sample=False)))
    return model, found


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_on_twenty_prompts(name, plain_texts):
    """One by one and four at a time, with rows that end early."""
    model, texts = plain_texts
    decoding = GREEDY[name]
    if decoding.drafter is None:
        decoding = SpeculativeDecoding(small("llama"), decoding.tree, decoding.acceptance)
    for batch, expected in texts:
        found = hf_argen.generate(model, decoding, **batch, max_new_tokens=10, do_sample=False)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_kinds_of_models(kind, implementation):
    model = language_model(kind, implementation)
    for part, tree in (
        (small(kind), DynamicTree(10, 2, 3)),
        (NGram(), Chain(4)),
        (small(kind), StaticTree([[0], [1], [1, 0]])),
    ):
        for options in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {"guidance_scale": 1.6}):
            inputs = {**prompts(), "max_new_tokens": 10, "do_sample": False, **options}
            expected = model.generate(**inputs)
            assert torch.equal(hf_argen.generate(model, SpeculativeDecoding(part, tree), **inputs), expected)


@pytest.mark.parametrize("tree", [Chain(3), DynamicTree(8, 2, 3)], ids=str)
def test_static_cache(tree):
    model = language_model("llama")
    inputs = {**prompts(), "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(**inputs)
    for drafter in (small("llama"), NGram()):
        decoding = SpeculativeDecoding(drafter, tree)
        found = hf_argen.generate(model, decoding, **inputs, cache_implementation="static")
        assert torch.equal(found, expected)
