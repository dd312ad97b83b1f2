"""Which drafts stay."""

import pytest
import torch

from hf_argen.kernels import use
from hf_argen.kernels.verify_draft import check_verified, verify_draft

from .kernel_base import KernelTests, refuses

PARENTS = [-1, -1, 0, 0, 1, 2, -1, 4]


def distributions(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 2).softmax(dim=-1)


def drawn(probs: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(probs.flatten(0, -2), 1).view(probs.shape[:-1])


def noise(*shape: int) -> torch.Tensor:
    return torch.empty(shape).exponential_()


def chain():
    """Rows of all lengths; targets close to the drafts, so that all ends occur."""
    draft = distributions(12, 5, 19)
    target = torch.cat([draft, draft[:, :1]], dim=1) + 0.3 * distributions(12, 6, 19)
    return {
        "target": target / target.sum(dim=-1, keepdim=True),
        "tokens": drawn(draft),
        "draft": draft,
        "uniform": torch.rand(12, 5),
        "noise": noise(12, 19),
        "lengths": torch.tensor([0, 1, 2, 3, 4, 5] * 2),
    }


def tree_of_draws():
    """Children that were drawn, each held against what the earlier ones left."""
    draft = distributions(16, 8, 7)
    return {
        "target": distributions(16, 9, 7),
        "tokens": drawn(draft),
        "draft": draft,
        "uniform": torch.rand(16, 8),
        "noise": noise(16, 7),
        "parents": torch.tensor(PARENTS).repeat(16, 1),
    }


def tree_of_best():
    """Children that were not drawn, trees of unequal form and size; a vocabulary of several tiles."""
    target = distributions(6, 9, 5001)
    parents = torch.tensor([PARENTS, [-1, 0, 1, 2, 3, 4, 5, 6], [-1] * 8]).repeat(2, 1)
    at = torch.cat([parents[:, :1] + 1, parents[:, 1:] + 1], dim=1)
    best = target.topk(8, dim=-1).indices.gather(1, at[..., None].expand(-1, -1, 8))
    return {
        "target": target,
        "tokens": torch.stack([best[:, i, i % 3] for i in range(8)], dim=1),
        "uniform": torch.rand(6, 8) * 0.02,
        "noise": noise(6, 5001),
        "lengths": torch.tensor([8, 8, 8, 5, 3, 8]),
        "parents": parents,
    }


def greedy_tree():
    inputs = {**tree_of_best(), "uniform": None, "noise": None}
    return inputs


def greedy_chain():
    target = distributions(4, 4, 9)
    tokens = target[:, :3].argmax(dim=-1)
    tokens[1, 1] = (tokens[1, 1] + 1) % 9
    tokens[2, 0] = (tokens[2, 0] + 1) % 9
    return {"target": target, "tokens": tokens}


def wrong_rows():
    """NaN, a cycle, a parent that is no node, nothing left to draw, more nodes than there are; and a sound row."""
    inputs = tree_of_draws()
    inputs = {name: value[:6].clone() for name, value in inputs.items()}
    inputs["target"][0] = torch.nan
    inputs["parents"][1, 2] = 5
    inputs["parents"][2, 0] = -2
    inputs["target"][3] = 0.0
    inputs["lengths"] = torch.tensor([8, 8, 8, 8, 9, 8])
    return inputs


def nothing_drafted():
    return {
        "target": distributions(3, 1, 6),
        "tokens": torch.zeros(3, 0).long(),
        "uniform": torch.rand(3, 0),
        "noise": noise(3, 6),
    }


CASES = (chain, tree_of_draws, tree_of_best, greedy_tree, greedy_chain, wrong_rows, nothing_drafted)


class TestVerifyDraft(KernelTests):
    function = staticmethod(verify_draft)
    cases = {case.__name__: case for case in CASES}
    dtypes = (torch.float32,)

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_wrong_rows(self, mode):
        with use(mode):
            path, lengths, tokens = verify_draft(**self.inputs("wrong_rows"))
        assert lengths[:5].tolist() == [-1, -2, -2, -1, -2] and lengths[5] >= 0
        assert (path[:5] == -1).all() and (tokens[:5] == 0).all()
        check_verified(lengths[5:].tolist())
        with pytest.raises(ValueError, match="Row 0 has no token to draw"):
            check_verified(lengths.tolist())
        with pytest.raises(ValueError, match="The drafts of row 0 are no tree"):
            check_verified(lengths[1:].tolist())

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_greedy_follows_the_best_tokens(self, mode):
        inputs = self.inputs("greedy_chain")
        with use(mode):
            path, lengths, tokens = verify_draft(**inputs)
        assert lengths.tolist() == [3, 1, 0, 3]
        assert path.tolist() == [[0, 1, 2], [0, -1, -1], [-1, -1, -1], [0, 1, 2]]
        best = inputs["target"].argmax(dim=-1)
        assert torch.equal(tokens, best.gather(1, lengths[:, None])[:, 0])

    @pytest.mark.parametrize("kind", ["chain", "drawn children", "fixed children"])
    def test_first_token_follows_the_target(self, kind):
        """40 000 rows, within five standard deviations, whatever was drafted."""
        rows, vocab = 40_000, 4
        target = distributions(1, 4, vocab).expand(rows, -1, -1)
        draft = distributions(1, 1, vocab).expand(rows, 3, -1)
        parents = None if kind == "chain" else torch.full((rows, 3), -1)
        tokens = drawn(draft)
        if kind == "fixed children":
            tokens, draft = torch.tensor([2, 0, 1]).repeat(rows, 1), None
        with use("reference"):
            path, lengths, last = verify_draft(
                target, tokens, draft, torch.rand(rows, 3), noise(rows, vocab), parents=parents
            )
        first = torch.where(lengths > 0, tokens.gather(1, path[:, :1].clamp(min=0))[:, 0], last)
        shares = first.bincount(minlength=vocab) / rows
        expected = target[0, 0]
        assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt()).all()
        assert 0.2 < (lengths > 0).float().mean() < 1.0

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                {"draft": torch.zeros(12, 5, 20)},
                "the drafter draws from 20 tokens, the model from 19; they must agree",
            ),
            ({"uniform": None}, "uniform and noise come together"),
            (
                {"target": torch.zeros(12, 5, 19)},
                r"target has the shape \(12, 5, 19\); it must be \(12, 6, any\)",
            ),
            ({"tokens": torch.zeros(12, 5).int()}, "tokens is torch.int32; it must be int64"),
            ({"target": torch.zeros(12, 6, 19).half()}, "target is torch.float16; it must be float32"),
            ({"lengths": torch.zeros(11).long()}, r"lengths has the shape \(11,\)"),
            ({"parents": torch.zeros(12, 4).long()}, r"parents has the shape \(12, 4\)"),
            ({"noise": torch.zeros(12, 19, device="meta")}, "noise is on meta and target on cpu"),
        ],
    )
    def test_bad_input(self, change, message):
        refuses(verify_draft, {**self.inputs("chain"), **change}, message)
