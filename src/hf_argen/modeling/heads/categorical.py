"""Categorical head: one softmax over the codebook."""

import torch
import torch.nn.functional as F
from torch import nn

from ..layers.precision import suited


class CategoricalHead(nn.Module):
    """Linear layer from hidden states (..., hidden_size) to logits (..., vocab_size)."""

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
