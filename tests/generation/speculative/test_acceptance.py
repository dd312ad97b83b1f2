"""Acceptance rules against recorded verdicts, and the mathematics of SpecTr."""

import pytest
import torch

from hf_argen import (
    Chain,
    ExactMatch,
    RejectionSampling,
    SpecTr,
    SpeculativeDecoding,
    StaticTree,
    TypicalAcceptance,
)
from hf_argen.generation.decoding.speculative.acceptance import AcceptanceRule
from hf_argen.generation.decoding.speculative.draft_tree import DraftContext, DraftTree
from hf_argen.generation.decoding.speculative.spectr import division_factor, kept_share, left_over
from hf_argen.generation.sampling import acceptance
from hf_argen.generation.transcript import Transcript

from ...helpers.goldens import golden
from .test_trees import Table, context


def recorded_tree(case):
    """The tree of the recorded candidates, and the model's logits at its nodes."""
    tensors = case.tensors
    shape = StaticTree(case.case["medusa_choices"]).grow(Table(1, 40), context(), 99)
    tokens = tensors["candidates/tree_candidates"][:, 1:]
    tree = DraftTree(tokens, shape.depth, shape.parents, branching=shape.branching)
    paths = tensors["buffers/retrieve_indices"]
    at = tensors["posterior/tree_logits_retrieved"]
    logits = at.new_zeros(1, tree.size + 1, at.shape[-1])
    for row, path in enumerate(paths.tolist()):
        for place, node in enumerate(path):
            if node >= 0:
                logits[0, node] = at[row, place]
    return tree, logits, paths


def drafting(do_sample):
    return DraftContext(Transcript(torch.zeros(1, 1, dtype=torch.long), [], []), do_sample)


def accepted(verdict):
    return verdict.nodes[0, : verdict.count[0]].tolist()


@pytest.mark.parametrize("name", ["medusa1_a", "medusa2_a"])
def test_verdicts_of_medusa(name):
    case = golden("medusa", name)
    tree, logits, paths = recorded_tree(case)

    def recorded(key):
        best, count = case.tensors[f"posterior/{key}_best_and_accept"].tolist()
        return paths[best, : count + 1].tolist()

    greedy = ExactMatch().verify(logits, tree, drafting(False))
    assert accepted(greedy) == recorded("greedy")
    assert greedy.tokens[0, greedy.count[0] - 1] == logits[0, accepted(greedy)[-1]].argmax()
    for i, setting in enumerate(case.case["typical"]):
        rule = TypicalAcceptance(setting["posterior_threshold"], setting["posterior_alpha"])
        found = rule.verify(logits / setting["temperature"], tree, drafting(True))
        assert accepted(found) == recorded(f"typical{i}")


def distributions(count=40, vocab=6):
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(2, count, vocab, generator=generator)).softmax(dim=-1).unbind(0)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_division_factor(k):
    """rho solves its equation, no token is kept more often than p, and what is left makes up for the rest."""
    p, q = distributions()
    number = torch.full((len(p),), k)
    rho = division_factor(p, q, number)
    share = kept_share(p, q, rho)
    some = 1 - (1 - share) ** k
    assert (rho >= 1).all() and (rho <= k).all()
    assert torch.allclose(some, rho * share, atol=1e-5) or k == 1
    kept = torch.minimum(q, p / rho) / share * some
    assert (kept <= p + 1e-6).all()
    assert torch.allclose(kept + (1 - some) * left_over(p, q, rho, number), p, atol=1e-5)
    if k == 1:
        single = q * acceptance(p, q)
        assert torch.allclose(kept, single, atol=1e-6)


def test_typical_acceptance_keeps_no_unlikely_draft():
    """Its bound: what is kept has more than min(threshold, alpha * exp(-entropy)), and a larger one keeps less."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(200, 4, 10)
    tokens = torch.randint(0, 10, (200, 3))
    tree = DraftTree(tokens, 3)
    kept = []
    for threshold in (0.0, 0.1, 0.5, 1.0):
        rule = TypicalAcceptance(threshold, 100.0)
        verdict = rule.verify(logits, tree, DraftContext(Transcript(tokens[:, :1], [], []), True))
        for row, count in enumerate(verdict.count):
            for i in range(count - 1):
                assert logits[row, i].softmax(-1)[tokens[row, i]] > threshold
        kept.append(sum(verdict.count))
    assert kept[0] == 200 * 4 > kept[1] > kept[2] > kept[3] == 200


def test_bad_rules():
    for make, message in (
        (lambda: TypicalAcceptance(threshold=2.0), "threshold is 2.0"),
        (lambda: TypicalAcceptance(alpha=-1.0), "alpha is -1"),
        (
            lambda: SpeculativeDecoding(tree=StaticTree(), acceptance=SpecTr()),
            "SpecTr needs drafts that are drawn",
        ),
        (
            lambda: AcceptanceRule.from_dict({"type": "lending_acceptance"}),
            "no acceptance rule 'lending_acceptance'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match="The acceptance rule is a int; give one of exact_match"):
        SpeculativeDecoding(acceptance=3)
    assert SpeculativeDecoding(tree="chain", acceptance="rejection_sampling") == SpeculativeDecoding(
        None, Chain(), RejectionSampling()
    )
