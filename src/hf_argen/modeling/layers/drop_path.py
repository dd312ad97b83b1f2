"""Stochastic depth (arXiv 1603.09382)."""

import torch
from torch import nn


class DropPath(nn.Module):
    """In training, drops a residual branch for a whole row of the batch and scales the kept ones up."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1 - self.rate
        mask = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * mask.div_(keep)
