"""Drafts from the text alone: what is copied, what the adaptive table learns, how it is explored."""

import numpy as np
import pytest
import torch

import hf_argen
from hf_argen import (
    AdaptiveNGram,
    Chain,
    DraftModel,
    DynamicTree,
    NGram,
    OptTree,
    RejectionSampling,
    SearchTree,
    SpeculativeDecoding,
)
from hf_argen.generation.decoding.speculative.adaptive_ngram import AdaptiveRow
from hf_argen.generation.decoding.speculative.ngram import Occurrences

from ...helpers.enumerator import assert_same_distribution
from ...helpers.language_models import language_model, prompts
from ...helpers.table_model import TableModel, distribution, run
from .test_lossless import plain


def test_the_last_occurrence_of_the_longest_match_is_copied():
    text = Occurrences(3, [1, 2, 3, 4, 5, 2, 3, 6, 9, 1, 2, 3])
    assert text.copied(3, 1) == [4, 5, 2]  # after 1 2 3, though 2 3 came later
    assert text.copied(3, 3) == [4, 5, 2]
    text.extend([7])
    assert text.copied(2, 1) == []
    text.extend([2])
    assert text.copied(2, 1) == [3, 7] and text.copied(2, 2) == []
    assert dict(text.following([])) == {3: 3}
    assert dict(text.following([3])) == {4: 1, 6: 1, 7: 1}


def test_a_copy_that_reaches_the_end_goes_on_from_itself():
    text = Occurrences(2, [1, 2, 1, 2])
    assert text.copied(5, 1) == [1, 2, 1, 2, 1]


def test_copies_pay_where_text_repeats():
    """A model that goes round in circles: after one round every step gains the whole draft."""
    model = TableModel(6, 0, spread=0.0)
    for token in range(6):
        model.table[:, token, (token + 1) % 6] = 9.0
    output = run(SpeculativeDecoding(NGram(), Chain(5)), model, [[0, 1]], 40, do_sample=False)
    lengths = output.details["accept_lengths"][0].tolist()
    assert lengths[0] == 1 and lengths[-3] == 6
    assert output.sequences[0, :6].tolist() == [2, 3, 4, 5, 0, 1]
    assert output.forward_calls == len(lengths) + 1


def test_drafting_is_given_up_where_it_loses():
    torch.manual_seed(0)
    model = TableModel(40, 1)
    prompt = torch.randint(0, 40, (2, 6)).tolist()
    never = SpeculativeDecoding(DraftModel(TableModel(40, 2)), Chain(3))
    gives_up = SpeculativeDecoding(DraftModel(TableModel(40, 2)), Chain(3), give_up_below=1.5)
    calls = [run(decoding, model, prompt, 60).forward_calls for decoding in (never, gives_up)]
    assert calls[1] < 0.75 * calls[0]
    with pytest.raises(ValueError, match=r"give_up_below is 0.5"):
        SpeculativeDecoding(give_up_below=0.5)


# The adaptive table


def test_the_table_of_a_corpus_and_what_it_learns(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.array([1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2], dtype=np.uint16))
    options = AdaptiveNGram(str(path), kept=1)
    model = TableModel(6, 0)
    decoding = SpeculativeDecoding(options, SearchTree(nodes=6, depth=2, iterations=20))
    expected = run(hf_argen.NextToken(), model, [[1, 2]], 8, do_sample=False).sequences
    assert torch.equal(run(decoding, model, [[1, 2]], 8, do_sample=False).sequences, expected)
    row = AdaptiveRow(options, {(1, 2): {3: 0.5}}, [1, 2])
    assert dict(row.following([])) == {3: 0.5}
    row.extend([4])
    assert row.after((1, 2)) == {3: 0.5, 4: 0.04} and row.base == {(1, 2): {3: 0.5}}
    for _ in range(100):
        row.extend([])
    assert row.after((1, 2))[4] == 3.0


def test_the_search_visits_what_is_likely_and_what_is_new():
    row = AdaptiveRow(
        AdaptiveNGram(), {(0, 1): {2: 0.6, 3: 0.3, 4: 0.1}, (1, 2): {5: 1.0}, (1, 3): {6: 1.0}}, [0, 1]
    )
    tokens, parents = SearchTree(nodes=5, depth=2, iterations=60).search(row, 2)
    paths = {
        tuple(reversed([tokens[i], *([tokens[parents[i]]] if parents[i] >= 0 else [])]))
        for i in range(len(tokens))
    }
    assert {(2,), (3,), (4,), (2, 5)} <= {tuple(path) for path in paths}
    assert all(parent < i for i, parent in enumerate(parents))
    few, _ = SearchTree(nodes=2, depth=2, iterations=60).search(row, 2)
    assert few == [2, 5]


@pytest.mark.parametrize("tree", [SearchTree(4, 2, 12), Chain(2), OptTree(3, 0.05, 4)], ids=str)
def test_the_adaptive_table_changes_no_distribution(tree):
    model = TableModel(3, 0)
    prompt = [[0, 1, 2, 0, 1]]
    decoding = SpeculativeDecoding(AdaptiveNGram(), tree, RejectionSampling())
    assert_same_distribution(distribution(decoding, model, prompt, 3), plain(model, prompt, 3))


def test_the_adaptive_table_on_a_model():
    model = language_model("llama")
    for tree in (None, DynamicTree(8, 2, 3)):
        inputs = {**prompts(), "max_new_tokens": 10, "do_sample": False}
        expected = model.generate(**inputs)
        assert torch.equal(
            hf_argen.generate(model, SpeculativeDecoding(AdaptiveNGram(), tree), **inputs), expected
        )


def test_bad_options(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.zeros((2, 2)))
    model = TableModel(3, 0)
    for make, message in (
        (lambda: NGram(longest=0), "NGram looks up 1 to 0 tokens"),
        (lambda: AdaptiveNGram(window=2), "window of AdaptiveNGram is 2"),
        (lambda: AdaptiveNGram(step=0.0), r"step of AdaptiveNGram is 0\.0"),
        (lambda: SearchTree(nodes=0), "nodes of SearchTree is 0"),
        (
            lambda: run(SpeculativeDecoding(AdaptiveNGram("none.npy")), model, [[0, 1]], 3),
            "'none.npy' does not exist",
        ),
        (
            lambda: run(SpeculativeDecoding(AdaptiveNGram(str(path))), model, [[0, 1]], 3),
            r"has the shape \(2, 2\)",
        ),
        (
            lambda: run(SpeculativeDecoding(DraftModel(TableModel(3, 1)), SearchTree()), model, [[0, 1]], 3),
            "SearchTree explores tables of text; use it with AdaptiveNGram or NGram",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
