"""Norm with modulation behind a gated residual."""

import pytest
import torch

from hf_argen.kernels import use
from hf_argen.kernels.adaln import adaln

from .kernel_base import KernelTests, assert_agree, refuses


def var_block():
    """As VAR calls it: modulations are views of one tensor, one for each row of the batch."""
    gate, scale, shift = torch.randn(3, 1, 3, 37).unbind(2)
    return {
        "hidden_states": torch.randn(3, 19, 37) * 3 + 1,
        "update": torch.randn(3, 19, 37),
        "gate": gate,
        "scale": scale,
        "shift": shift,
    }


def rar_block():
    """As RAR calls it: a modulation for each token, norms with weights; a transposed input."""
    gate, scale, shift = torch.randn(2, 5, 3, 48).unbind(2)
    return {
        "hidden_states": torch.randn(5, 2, 48).transpose(0, 1),
        "update": torch.randn(2, 5, 48),
        "gate": gate,
        "scale": scale,
        "shift": shift,
        "weight": torch.rand(48) + 0.5,
        "bias": torch.randn(48),
        "eps": 1e-5,
    }


def first_norm():
    """Without a residual, one modulation for all tokens."""
    return {
        "hidden_states": torch.randn(2, 17, 20),
        "scale": torch.randn(2, 1, 20),
        "shift": torch.randn(2, 1, 20),
    }


def rms_block():
    """As LlamaGen calls it: an RMS norm behind a sum, without modulation."""
    return {
        "hidden_states": torch.randn(1, 3, 96),
        "update": torch.randn(1, 3, 96),
        "weight": torch.rand(96) + 0.5,
        "rms": True,
        "eps": 1e-5,
    }


def modulated_rms():
    """A gate for all tokens, modulations for each."""
    return {
        "hidden_states": torch.randn(2, 3, 33),
        "update": torch.randn(2, 3, 33),
        "gate": torch.randn(2, 1, 33),
        "scale": torch.randn(2, 3, 33),
        "shift": torch.randn(2, 3, 33),
        "rms": True,
    }


def one_row():
    """A single vector for all rows of the batch and all tokens; wide enough for sums of tokens in several programs."""
    gate, scale, shift = torch.randn(3, 1, 1, 9)
    return {
        "hidden_states": torch.randn(2, 35, 9),
        "update": torch.randn(2, 35, 9),
        "gate": gate,
        "scale": scale,
        "shift": shift,
    }


def vectors():
    """States without a dimension of tokens."""
    return {"hidden_states": torch.randn(5, 12), "weight": torch.rand(12) + 0.5, "bias": torch.randn(12)}


def empty():
    """A batch without tokens."""
    return {
        "hidden_states": torch.randn(2, 0, 8),
        "scale": torch.randn(2, 1, 8),
        "shift": torch.randn(2, 1, 8),
    }


class TestAdaLN(KernelTests):
    function = staticmethod(adaln)
    cases = {
        one.__name__: one
        for one in (var_block, rar_block, first_norm, rms_block, modulated_rms, one_row, vectors, empty)
    }
    differentiable = ("hidden_states", "update", "gate", "scale", "shift", "weight", "bias")

    @pytest.mark.parametrize("asked", [torch.bfloat16, None])
    def test_mixed_dtypes(self, asked):
        """Of bfloat16 states and float32 modulations, as the norm in front of a head gets them."""
        inputs = {**self.inputs("first_norm"), "dtype": asked}
        inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
        with use("reference"):
            expected = adaln(**inputs)[0]
        with use("triton"):
            found = adaln(**inputs)[0]
        assert found.dtype == (torch.float32 if asked is None else asked)
        assert_agree(found, expected)

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_float32_states_stay_float32(self, mode):
        """Under autocast modulations are bfloat16; the residual stream must not be rounded to it."""
        inputs = self.inputs("first_norm")
        scale = inputs["scale"].bfloat16()
        with use(mode):
            normed, residual = adaln(inputs["hidden_states"], scale, scale, update=inputs["hidden_states"])
        assert normed.dtype == residual.dtype == torch.float32
        assert torch.equal(residual, 2 * inputs["hidden_states"])

    def test_residual_without_update_is_the_input(self):
        inputs = self.inputs("first_norm")
        for mode in ("reference", "triton"):
            with use(mode):
                assert adaln(**inputs)[1] is inputs["hidden_states"]

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"scale": None}, "scale and shift come together"),
            ({"update": None}, "a gate came without an update"),
            ({"rms": True, "bias": torch.zeros(37)}, "an RMS norm has no bias"),
            ({"weight": torch.zeros(36)}, r"weight has the shape \(36,\); it must be \(37\)"),
            ({"gate": torch.zeros(3, 18, 37)}, r"gate has the shape \(3, 18, 37\); it must be \(3, 19, 37\)"),
            ({"shift": torch.zeros(3, 37)}, r"shift has the shape \(3, 37\)"),
            (
                {"scale": torch.zeros(3, 1, 37, dtype=torch.float64)},
                "scale is torch.float64; it must be float32",
            ),
            ({"update": torch.zeros(3, 19, 37, device="meta")}, "update is on meta and hidden_states on cpu"),
        ],
    )
    def test_bad_input(self, change, message):
        refuses(adaln, {**self.inputs("var_block"), **change}, message)
