"""Norm of queries and keys, rotary embedding and the write into the cache."""

import pytest
import torch

from hf_argen.kernels import use
from hf_argen.kernels.qk_norm_rope import Rotation, Slot, qk_norm_rope

from .kernel_base import KernelTests, refuses


def heads(rows: int, number: int, n: int, head_dim: int) -> torch.Tensor:
    """As a projection gives them: the heads of a token side by side."""
    return torch.randn(rows, n, number, head_dim).transpose(1, 2)


def rotation(rows: int, n: int, pairs: int, interleaved: bool = True) -> Rotation:
    angles = torch.randn(rows, n, pairs) * 3
    return Rotation.of(angles.cos(), angles.sin(), interleaved)


def var():
    """Cosines with a factor for each head, written to the end of the cache."""
    keys, values = torch.full((2, 2, 3, 9, 20), torch.nan)
    return {
        "query": heads(2, 3, 4, 20),
        "key": heads(2, 3, 4, 20),
        "value": heads(2, 3, 4, 20),
        "norm": "l2",
        "eps": 1e-12,
        "query_scale": torch.rand(3) + 1,
        "slot": Slot(keys, values, None, 5),
    }


def llamagen():
    """Adjacent channels turned by one table for all rows, written to places of each row."""
    keys, values = torch.zeros(2, 3, 2, 7, 12)
    return {
        "query": heads(3, 2, 2, 12),
        "key": heads(3, 2, 2, 12),
        "value": heads(3, 2, 2, 12),
        "rotation": rotation(1, 2, 6),
        "slot": Slot(keys, values, torch.tensor([[0, 1], [6, 2], [3, 4]])),
    }


def rar():
    """Layer norms with weights and biases, no rotation, no cache; more heads than one program does."""
    named = {
        f"{name}_{kind}": torch.rand(48) + 0.5 for name in ("query", "key") for kind in ("weight", "bias")
    }
    return {"query": heads(1, 40, 3, 48), "key": heads(1, 40, 3, 48), "norm": "layer", **named}


def grouped():
    """RMS norms, halves turned by a table for each row, fewer heads of keys."""
    return {
        "query": heads(2, 6, 3, 16),
        "key": heads(2, 2, 3, 16),
        "norm": "rms",
        "query_weight": torch.rand(16) + 0.5,
        "key_weight": torch.rand(16) + 0.5,
        "rotation": rotation(2, 3, 8, interleaved=False),
    }


def no_tokens():
    return {"query": heads(2, 2, 0, 8), "key": heads(2, 2, 0, 8), "norm": "l2"}


class TestQKNormRope(KernelTests):
    function = staticmethod(qk_norm_rope)
    cases = {case.__name__: case for case in (var, llamagen, rar, grouped, no_tokens)}

    def outputs(self, inputs):
        inputs = dict(inputs)
        slot = inputs.pop("slot", None)
        if slot is None:
            return qk_norm_rope(**inputs)
        # The cache is allocated here, so that every call of a test has its own.
        dtype = inputs["query"].dtype
        slot = Slot(slot.keys.to(dtype, copy=True), slot.values.to(dtype, copy=True), *slot[2:])
        return (*qk_norm_rope(**inputs, slot=slot), slot.keys, slot.values)

    def test_registration_without_cache(self):
        for operation, arguments, keywords in self.operation_calls(self.inputs("grouped")):
            with use("triton"):
                torch.library.opcheck(operation, arguments, keywords)

    def test_gradients_take_the_reference(self):
        inputs = self.inputs("grouped")
        inputs["query"].requires_grad_()
        with use("triton"):
            query, _ = qk_norm_rope(**inputs)
        query.square().sum().backward()
        assert inputs["query"].grad.abs().sum() > 0

    def test_rotation_keeps_lengths_and_turns_by_differences(self):
        """The product of a turned query and key depends on the difference of their angles alone."""
        states = torch.randn(1, 1, 2, 6)
        for interleaved in (True, False):
            for shift in (0.0, 0.7):
                angles = torch.tensor([0.3, 1.1])[None, :, None].expand(1, 2, 3) + shift
                turned = Rotation.of(angles.cos(), angles.sin(), interleaved).apply(states)
                product = (turned[..., 0, :] * turned[..., 1, :]).sum()
                if shift == 0:
                    first = product
            torch.testing.assert_close(product, first)
            torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_sections_of_channels_with_positions_of_their_own(self, mode):
        """As Qwen2-VL turns them (arXiv 2409.12191), by time, row and column: each section like a head of its own."""
        sections = {0: slice(0, 2), 1: slice(2, 5), 2: slice(5, 8)}  # axis: its pairs
        positions, frequencies = torch.randint(9, (3, 2, 5, 1)), 0.5 ** torch.arange(8)
        angles = torch.cat([positions[axis] * frequencies[pairs] for axis, pairs in sections.items()], dim=-1)
        query, key = heads(2, 4, 5, 16), heads(2, 4, 5, 16)
        with use(mode):
            found = qk_norm_rope(
                query, key, rotation=Rotation.of(angles.cos(), angles.sin(), interleaved=False)
            )
        for states, turned in zip((query, key), found, strict=True):
            before, after = (torch.complex(*one.contiguous().chunk(2, dim=-1)) for one in (states, turned))
            for axis, pairs in sections.items():
                angle = (positions[axis] * frequencies[pairs])[:, None]
                expected = before[..., pairs] * torch.polar(torch.ones_like(angle), angle)
                torch.testing.assert_close(after[..., pairs], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "base, change, message",
        [
            ("grouped", {"norm": "batch"}, "norm is 'batch'; it must be one of None, 'l2', 'rms', 'layer'"),
            ("grouped", {"key_weight": None}, "weights and biases of queries and keys come together"),
            ("grouped", {"norm": "l2"}, "query_weight came with norm='l2', which has none"),
            ("grouped", {"key": torch.zeros(2, 2, 4, 16)}, r"key has the shape \(2, 2, 4, 16\)"),
            ("grouped", {"query": torch.zeros(2, 6, 3, 15)}, "heads have 15 channels; the number must be even"),
            ("grouped", {"rotation": rotation(2, 3, 7)}, r"cos has the shape \(2, 3, 7\); it must be \(2, 3, 8\)"),
            ("var", {"value": None}, "a slot came without values"),
            ("var", {"query_scale": torch.ones(4)}, r"query_scale has the shape \(4,\)"),
            ("var", {"slot": Slot(*torch.zeros(2, 2, 3, 8, 20), None, 5)}, "positions 5 to 8 do not fit into a cache of 8"),
            ("llamagen", {"slot": Slot(*torch.zeros(2, 3, 2, 7, 12), torch.zeros(3, 1).long())}, "places has the shape"),
            ("var", {"key": torch.zeros(2, 3, 4, 20, device="meta")}, "key is on meta and query on cpu"),
            ("var", {"key": torch.zeros(2, 3, 4, 20).double()}, "key is torch.float64"),
        ],
    )  # fmt: skip
    def test_bad_input(self, base, change, message):
        with torch.no_grad():
            refuses(qk_norm_rope, {**self.inputs(base), **change}, message)
