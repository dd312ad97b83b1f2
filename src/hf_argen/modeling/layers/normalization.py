"""Norms."""

import torch
from torch import nn

from ...kernels.adaln import adaln


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast back, times a learned weight (arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(
        self, hidden_states: torch.Tensor, update: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of `hidden_states`; with `update`, that of hidden_states + update, and this sum."""
        normed, residual = adaln(hidden_states, eps=self.eps, update=update, weight=self.weight, rms=True)
        return normed if update is None else (normed, residual)
