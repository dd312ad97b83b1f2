"""Categorical head: one softmax over the codebook."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.precision import suited


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
        return self.out_proj(suited(hidden_states, self.out_proj)).float()

    @staticmethod
    def loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
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
