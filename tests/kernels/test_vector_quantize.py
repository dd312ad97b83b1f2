"""Vectors to codes."""

import pytest
import torch
import torch.nn.functional as F

from hf_argen.kernels import use
from hf_argen.kernels.vector_quantize import (
    nearest_codes,
    nearest_codes_of_scale,
    sign_quantize,
    vector_quantize,
)

from .kernel_base import KernelTests, assert_agree, refuses


def plain():
    """Vectors that are not contiguous, more codes than one step takes, few enough that programs share them."""
    return {"vectors": torch.randn(8, 37).t(), "codes": torch.randn(301, 8)}


def cosines():
    return {"vectors": torch.randn(5, 45), "codes": torch.randn(70, 45) * 3, "metric": "cosine"}


def equal_codes():
    """The first of equal codes is taken, also across steps and programs."""
    codes = torch.randn(10, 4).repeat(20, 1)
    return {"vectors": codes[:7] + 0.01, "codes": codes}


def nothing():
    return {"vectors": torch.randn(0, 4), "codes": torch.randn(3, 4)}


class TestVectorQuantize(KernelTests):
    function = staticmethod(vector_quantize)
    cases = {case.__name__: case for case in (plain, cosines, equal_codes, nothing)}
    differentiable = ("vectors",)

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_finds_what_a_search_finds(self, mode):
        inputs = self.inputs("plain")
        with use(mode):
            ids = nearest_codes(**inputs)
        assert torch.equal(ids, torch.cdist(inputs["vectors"], inputs["codes"]).argmin(dim=1))

    def test_codes_have_no_gradient(self):
        codes = torch.randn(5, 3, requires_grad=True)
        vectors = torch.randn(2, 3, requires_grad=True)
        for mode in ("reference", "triton"):
            with use(mode):
                quantized, ids = vector_quantize(vectors, codes)
            torch.testing.assert_close(quantized, codes[ids])
            (gradient, none) = torch.autograd.grad(quantized.sum(), (vectors, codes), allow_unused=True)
            assert torch.equal(gradient, torch.ones(2, 3)) and none is None

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"metric": "l1"}, "metric is 'l1'; it must be one of l2, cosine"),
            (
                {"codes": torch.zeros(9, 7)},
                "vectors have 8 channels and codes 7; they belong to another codebook",
            ),
            ({"codes": torch.zeros(0, 8)}, "the codebook is empty"),
            ({"vectors": torch.zeros(8)}, r"vectors has the shape \(8,\)"),
            ({"vectors": torch.zeros(2, 8).long()}, "vectors is torch.int64"),
            ({"codes": torch.zeros(2, 8, device="meta")}, "codes is on meta and vectors on cpu"),
        ],
    )
    def test_bad_input(self, change, message):
        refuses(vector_quantize, {**self.inputs("plain"), **change}, message)


def whole_map():
    """The last scale, without averaging."""
    return {"residual": torch.randn(2, 5, 4, 4), "codes": torch.randn(33, 5), "size": (4, 4)}


def uneven_windows():
    """Cells that overlap, of a map that is not square."""
    return {
        "residual": torch.randn(2, 3, 8, 6),
        "codes": torch.randn(20, 3),
        "size": (3, 5),
        "metric": "cosine",
    }


class TestNearestCodesOfScale(KernelTests):
    function = staticmethod(nearest_codes_of_scale)
    cases = {case.__name__: case for case in (uneven_windows, whole_map)}

    def test_larger_grids_take_the_reference(self):
        inputs = {**self.inputs("whole_map"), "size": (6, 6)}
        with use("triton"):
            found = nearest_codes_of_scale(**inputs)
        with use("reference"):
            assert_agree(found, nearest_codes_of_scale(**inputs))


def lfq():
    return {"latents": torch.randn(35, 18)}


def bsq():
    return {"latents": F.normalize(torch.randn(3, 36), dim=-1), "scale": 36**-0.5}


class TestSignQuantize(KernelTests):
    function = staticmethod(sign_quantize)
    cases = {case.__name__: case for case in (lfq, bsq)}
    differentiable = ("latents",)

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_bits(self, mode):
        with use(mode):
            codes, ids = sign_quantize(torch.tensor([[0.5, -1.0, 0.0], [1.0, 1.0, 1.0]]), 0.5)
        assert ids.tolist() == [4, 7]
        assert codes.tolist() == [[0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]

    def test_bad_input(self):
        refuses(sign_quantize, {"latents": torch.zeros(2, 63)}, "latents have 63 bits; it must be 1 to 62")
        refuses(sign_quantize, {"latents": torch.zeros(2, 3, 3)}, "latents has the shape")
