"""Attention of nodes to a cache and to their ancestors."""

import pytest
import torch
import torch.nn.functional as F

from hf_argen.generation.predictors.masks import Pattern, View, additive
from hf_argen.generation.predictors.tree import NodeTree
from hf_argen.kernels import use
from hf_argen.kernels.tree_attention import pack, tree_attention
from hf_argen.kernels.tree_attention.reference import unpack

from .kernel_base import KernelTests, Recorder, refuses


def ancestors_of(parents: list[list[int]], n: int) -> torch.Tensor:
    tree = NodeTree()
    tree.grow(len(parents[0]), torch.tensor(parents), len(parents), torch.device("cpu"))
    return tree.ancestors(n, torch.device("cpu"))


def cache(
    rows: int, heads: int, capacity: int, head_dim: int, ends: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, NaN beyond the end of each row."""
    keys, values = torch.randn(2, rows, heads, capacity, head_dim)
    for row, end in enumerate(ends):
        keys[row, :, end:] = values[row, :, end:] = torch.nan
    return keys, values


def tree():
    """Rows of unequal length, one empty, each with a tree of its own; grouped heads, holes, nodes of earlier calls."""
    parents = [[-1, 0, 0, 1, 2, -1], [-1, 0, 1, 2, 3, 4], [-1, -1, -1, 0, 1, 2]]
    keys, values = cache(3, 2, 70, 12, [61, 6, 22])
    return {
        "query": torch.randn(3, 4, 4, 12),
        "keys": keys,
        "values": values,
        "starts": torch.tensor([55, 0, 16]),
        "ancestors": pack(ancestors_of(parents, 4)),
        "nodes": 6,
        "hidden": pack(torch.rand(3, 50) < 0.3),
    }


def one_token():
    """Keys split among programs."""
    keys, values = cache(1, 1, 1100, 20, [1001])
    return {
        "query": torch.randn(1, 2, 1, 20),
        "keys": keys,
        "values": values,
        "starts": torch.tensor([1000]),
        "ancestors": pack(torch.ones(1, 1, 1, dtype=torch.bool)),
        "nodes": 1,
        "columns": 1001,
    }


def scale():
    """As many nodes as three words of a mask hold, that all see each other, strided as projections give them."""
    keys, values = (one.transpose(1, 2) for one in torch.randn(2, 2, 100, 3, 16))
    return {
        "query": torch.randn(2, 70, 3, 16).transpose(1, 2),
        "keys": keys,
        "values": values,
        "starts": torch.tensor([21, 21]),
        "ancestors": pack(torch.ones(1, 70, 70, dtype=torch.bool)),
        "nodes": 70,
        "scaling": 1.0,
    }


def most_nodes():
    """As many nodes as one call may have, in a chain."""
    seen = torch.ones(1, 256, 256, dtype=torch.bool).tril()
    keys, values = torch.randn(2, 1, 1, 256, 16)
    return {
        "query": torch.randn(1, 1, 256, 16),
        "keys": keys,
        "values": values,
        "starts": torch.zeros(1).long(),
        "ancestors": pack(seen),
        "nodes": 256,
    }


def sees_nothing():
    """A row without committed places whose first node does not even see itself."""
    seen = torch.eye(2, dtype=torch.bool)[None].clone()
    seen[0, 0, 0] = False
    keys, values = cache(1, 1, 8, 16, [2])
    return {
        "query": torch.randn(1, 1, 2, 16),
        "keys": keys,
        "values": values,
        "starts": torch.zeros(1).long(),
        "ancestors": pack(seen),
        "nodes": 2,
    }


class TestTreeAttention(KernelTests):
    function = staticmethod(tree_attention)
    cases = {case.__name__: case for case in (tree, one_token, scale, most_nodes, sees_nothing)}

    def test_bits(self):
        bits = torch.rand(2, 3, 75) < 0.5
        bits[0, 0, [31, 63]] = True
        packed = pack(bits)
        assert packed.shape == (2, 3, 3) and packed.dtype == torch.int32
        assert torch.equal(unpack(packed, 75), bits)

    @pytest.mark.parametrize("n, head_dim", [(257, 2), (1, 257)])
    def test_more_takes_the_reference(self, n, head_dim):
        inputs = {
            "query": torch.randn(1, 1, n, head_dim),
            "keys": torch.randn(1, 1, n, head_dim),
            "values": torch.randn(1, 1, n, head_dim),
            "starts": torch.zeros(1).long(),
            "ancestors": pack(torch.ones(1, n, n, dtype=torch.bool)),
            "nodes": n,
        }
        with use("triton"), Recorder() as recorder:
            found = tree_attention(**inputs)
        assert not recorder.calls
        expected = F.scaled_dot_product_attention(*(inputs[name] for name in ("query", "keys", "values")))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_agrees_with_the_masks_of_the_predictors(self, mode):
        """What torch's attention gives under the additive masks that decoding uses today."""
        inputs = self.inputs("tree")
        keys, values = (inputs[name].nan_to_num() for name in ("keys", "values"))
        hidden = unpack(inputs["hidden"], 50) & (torch.arange(50) < inputs["starts"][:, None])
        view = View(inputs["starts"], 70, unpack(inputs["ancestors"], 6), hidden)
        mask = additive(view.visible(Pattern(), 3), torch.float32)
        expected = F.scaled_dot_product_attention(inputs["query"], keys, values, mask, enable_gqa=True)
        with use(mode):
            torch.testing.assert_close(tree_attention(**inputs), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"nodes": 71}, r"4 new of 71 nodes and 70 columns do not fit into a cache of 70"),
            ({"keys": torch.zeros(3, 3, 70, 12), "values": torch.zeros(3, 3, 70, 12)}, "4 heads of queries cannot share 3"),
            ({"values": torch.zeros(3, 2, 69, 12)}, r"values has the shape \(3, 2, 69, 12\)"),
            ({"keys": torch.zeros(3, 2, 70, 12).half()}, "keys is torch.float16; it must be float32"),
            ({"ancestors": torch.zeros(3, 4, 2).int()}, r"ancestors has the shape \(3, 4, 2\); it must be \(3, 4, 1\)"),
            ({"ancestors": torch.zeros(3, 4, 1).long()}, "ancestors is torch.int64; it must be int32"),
            ({"starts": torch.zeros(2).long()}, r"starts has the shape \(2,\)"),
            ({"hidden": torch.zeros(3, 2, device="meta").int()}, "hidden is on meta and query on cpu"),
        ],
    )  # fmt: skip
    def test_bad_input(self, change, message):
        refuses(tree_attention, {**self.inputs("tree"), **change}, message)
