"""Categorical head: one softmax over the codebook."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ...generation import sampling
from ...generation.sampling import Generators
from ..layers.linear import linear
from ..layers.precision import suited
from .continuous import check_draw


class CategoricalHead(nn.Module):
    """
    Linear layer from hidden states (..., hidden_size) to logits (..., vocab_size).

    Attributes:
        has_confidence: that it tells how sure it is of a token, by the token's logit.
    """

    head_type: ClassVar[str] = "categorical"
    has_confidence: ClassVar[bool] = True

    def __init__(self, hidden_size: int, vocab_size: int, bias: bool = True):
        super().__init__()
        self.out_proj = nn.Linear(hidden_size, vocab_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits in float32, whatever the dtype of the weights."""
        return linear(self.out_proj, suited(hidden_states, self.out_proj)).float()

    def loss(
        self,
        target: torch.Tensor,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """
        Mean cross-entropy.

        Args:
            target: (batch, n) int64 ids; those of -100 do not count.
            hidden: (batch, n, hidden_size).
            mask: (batch, n), nonzero where an id counts; default: all.

        Returns:
            scalar float32.
        """
        if mask is not None:
            target = torch.where(mask.bool(), target, -100)
        return self.cross_entropy(self(hidden), target, label_smoothing)

    def guided(self, hidden: torch.Tensor, guidance: float | torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, n, vocab_size) float32, of conditional and unconditional hidden states; see `sample`."""
        logits = self(hidden)
        if guidance is None:
            return logits
        if isinstance(guidance, torch.Tensor):
            guidance = guidance.view(-1, 1, 1)
        conditional, unconditional = logits.chunk(2)
        return conditional + (guidance - 1) * (conditional - unconditional)

    def sample(
        self,
        hidden: torch.Tensor,
        guidance: float | torch.Tensor | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        do_sample: bool = True,
    ) -> torch.Tensor:
        """
        One id for each hidden state.

        Args:
            hidden: (batch, n, hidden_size); with `guidance` (2 * batch, n, hidden_size), conditional rows first.
            guidance: weight of the conditional against the unconditional logits, or one for each row (batch,); `None`: no
                guidance.
            temperature: above 0; divides the logits.
            generator: one, or one per row; `None` is torch's global one.
            do_sample: `False` takes the likeliest.

        Returns:
            (batch, n) int64.

        Raises:
            ValueError: a value out of range, an odd number of rows with guidance.
        """
        check_draw(self.head_type, self.out_proj.in_features, hidden, guidance, temperature)
        return self.draw(self.guided(hidden, guidance) / temperature, generator, do_sample)

    @staticmethod
    def draw(scores: torch.Tensor, generator: Generators, do_sample: bool) -> torch.Tensor:
        """Ids (batch, n) from scores (batch, n, vocab_size): drawn, or the best ones."""
        return sampling.draw(scores, generator) if do_sample else scores.argmax(dim=-1)

    @staticmethod
    def cross_entropy(
        logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Mean cross-entropy of logits (..., vocab_size) against labels (...); labels of -100 do not count."""
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)

    @staticmethod
    def masked_loss(
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        label_smoothing: float = 0.0,
        known_weight: float = 0.0,
    ) -> torch.Tensor:
        """
        Weighted mean cross-entropy of a picture of which some tokens were hidden (MaskGIT, arXiv 2202.04200).

        Args:
            logits: (batch, n, vocab_size).
            labels: (batch, n) int64; those of -100 do not count.
            mask: (batch, n), nonzero where a token was hidden.
            label_smoothing: share of the target that is spread over all codes.
            known_weight: of tokens that were not hidden, against 1 of those that were.

        Returns:
            scalar float32.
        """
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing, reduction="none"
        )
        weights = torch.where(mask.bool(), 1.0, known_weight) * (labels != -100)
        return (losses * weights.flatten()).sum() / (weights.sum() + 1e-8)
