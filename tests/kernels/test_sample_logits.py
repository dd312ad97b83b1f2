"""From logits to tokens."""

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_argen.kernels import use
from hf_argen.kernels.sample_logits import check_sampled, filter_logits, sample_logits

from .kernel_base import KernelTests, refuses

# Of the interpreter, which computes with numpy: rows with infinities, and log(0) for a min_p of 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def noise(*shape: int) -> torch.Tensor:
    return torch.empty(shape).exponential_()


def rows_with_own_options():
    """Every option alone and all together, one row each; rows of a larger tensor; a guided row of strength 0."""
    logits = torch.randn(7, 2, 1000)[:, 1] * 4
    return {
        "logits": logits,
        "noise": noise(7, 1000),
        "unconditional": torch.randn(7, 1000) * 4,
        "guidance": torch.tensor([0.0, 1.5, 0.0, 3.0, 0.0, 1.0, 0.25]),
        "temperature": torch.tensor([1.0, 1.0, 0.7, 1.3, 1.0, 1.0, 1.1]),
        "top_k": torch.tensor([0, 1, 900, 0, 2000, 0, 50]),
        "top_p": torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0, 0.05, 0.8]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 1.0, 0.01]),
        "return_probs": True,
    }


def smallest():
    """The vocabulary of bits, options the same in all rows, no probabilities."""
    return {"logits": torch.randn(3, 16), "noise": noise(3, 16), "top_k": 5, "top_p": 0.6}


def longer_than_registers():
    """A row that does not fit, not a multiple of a tile."""
    logits = torch.randn(2, 16_411) * 3
    return {"logits": logits, "noise": noise(2, 16_411), "top_k": 300, "top_p": 0.9, "return_probs": True}


def largest():
    """The vocabulary of a large language model."""
    return {"logits": torch.randn(1, 262_144) * 3, "noise": noise(1, 262_144), "top_k": 2000}


def equal_scores():
    """Ties at both bounds, the two zeros included, are kept together."""
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0], [0.0, -0.0, -1.0, 0.0, -2.0]])
    return {"logits": logits, "noise": noise(2, 5), "top_k": 2, "top_p": 0.9, "return_probs": True}


def best_tokens():
    return {"logits": torch.randn(4, 33), "noise": None, "top_p": 0.5}


def no_rows():
    return {"logits": torch.randn(0, 9), "noise": noise(0, 9), "top_k": 3}


def unsound_rows():
    """NaN, no allowed token, infinity, a temperature below 0; a sound row, and one with a single allowed token."""
    logits = torch.randn(6, 20)
    logits[0, 3] = torch.nan
    logits[1] = -torch.inf
    logits[2, 7] = torch.inf
    logits[5] = -torch.inf
    logits[5, 11] = 2.0
    return {
        "logits": logits,
        "noise": noise(6, 20),
        "temperature": torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0]),
        "top_k": 4,
        "top_p": 0.9,
        "return_probs": True,
    }


CASES = (
    rows_with_own_options,
    smallest,
    longer_than_registers,
    largest,
    equal_scores,
    best_tokens,
    no_rows,
    unsound_rows,
)


class TestSampleLogits(KernelTests):
    function = staticmethod(sample_logits)
    cases = {case.__name__: case for case in CASES}
    in_float32 = ("noise", "guidance", "temperature", "top_p", "min_p")

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_unsound_rows(self, mode):
        with use(mode):
            tokens, log_probs, probs = sample_logits(**self.inputs("unsound_rows"))
        assert tokens[:4].tolist() == [0, 0, 0, 0] and tokens[5] == 11
        assert log_probs[[0, 2, 3]].isnan().all() and log_probs[1] == -torch.inf
        assert log_probs[5] == 0 and log_probs[4].isfinite()
        assert probs[:4].isnan().all() and probs[4:].isfinite().all()
        check_sampled(log_probs[4:])
        with pytest.raises(ValueError, match="Row 0 has logits that are NaN or infinite"):
            check_sampled(log_probs)
        with pytest.raises(ValueError, match="Row 0 allows no token"):
            check_sampled(log_probs[1:2])

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_ties_stay_together(self, mode):
        with use(mode):
            probs = sample_logits(**self.inputs("equal_scores"))[2]
        assert (probs > 0).tolist() == [[True, True, True, True, False], [True, True, False, True, False]]

    def test_frequencies(self):
        """20 000 draws follow the truncated distribution, within five standard deviations."""
        logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]).expand(20_000, 5)
        with use("reference"):
            tokens, log_probs, probs = sample_logits(logits, noise(20_000, 5), top_k=3, return_probs=True)
        expected = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])[[1, 2, 4]].softmax(dim=0)
        torch.testing.assert_close(probs[0, [1, 2, 4]], expected)
        torch.testing.assert_close(log_probs, probs.gather(1, tokens[:, None])[:, 0].log())
        shares = tokens.bincount(minlength=5)[[1, 2, 4]] / 20_000
        assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"temperature": -0.5}, "temperature is -0.5; it must be above 0"),
            ({"top_k": -1}, "top_k is -1; it must be 0"),
            ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
            ({"min_p": 1.5}, r"min_p is 1.5; it must be in \[0, 1\]"),
            ({"top_k": torch.tensor([1, 2])}, r"top_k has the shape \(2,\); it must be \(3\)"),
            ({"noise": torch.ones(3, 15)}, r"noise has the shape \(3, 15\); it must be \(3, 16\)"),
            ({"noise": torch.ones(3, 16).half()}, "noise is torch.float16; it must be float32"),
            ({"unconditional": torch.ones(3, 17)}, "unconditional has the shape"),
            ({"logits": torch.ones(3, 16).long()}, "logits is torch.int64; it must be float32"),
            ({"logits": torch.ones(16)}, r"logits has the shape \(16,\)"),
            ({"logits": torch.ones(3, 0), "noise": None}, "the vocabulary is empty"),
            ({"noise": torch.ones(3, 16, device="meta")}, "noise is on meta and logits on cpu"),
        ],
    )
    def test_bad_input(self, change, message):
        refuses(sample_logits, {**self.inputs("smallest"), **change}, message)
        with use("reference"), pytest.raises(ValueError, match=message):
            sample_logits(**{**self.inputs("smallest"), **change})


def one_after_another():
    return {"logits": torch.randn(5, 211) * 3, "temperature": 0.8, "top_k": 40, "top_p": 0.85, "min_p": 0.02}


def guided():
    return {"logits": torch.randn(2, 50), "unconditional": torch.randn(2, 50), "guidance": 2.0, "top_p": 0.5}


class TestFilterLogits(KernelTests):
    function = staticmethod(filter_logits)
    cases = {case.__name__: case for case in (one_after_another, guided)}

    @pytest.mark.parametrize("mode", ["reference", "triton"])
    def test_does_what_the_warpers_of_transformers_do(self, mode):
        inputs = self.inputs("one_after_another")
        expected = inputs["logits"]
        warpers = [
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.85),
            MinPLogitsWarper(0.02),
        ]
        for warper in warpers:
            expected = warper(None, expected)
        with use(mode):
            assert torch.equal(filter_logits(**inputs), expected)
