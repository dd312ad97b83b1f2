"""Adaptive layer norm: a condition vector scales, shifts and gates the blocks of a transformer (arXiv 2212.09748)."""

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.adaln import adaln
from .linear import linear


def modulated_norm(
    hidden_states: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Layer norm without weights of its own, then * (1 + scale) + shift; these are (batch, 1 or tokens, hidden)."""
    return adaln(hidden_states, scale, shift, eps, dtype=dtype)[0]


class ModulatedLayerNorm(nn.LayerNorm):
    """A layer norm with weights that is modulated by a condition, and may stand behind a gated residual."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        update: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states, update: (batch, tokens, hidden).
            scale, shift, gate: (batch, 1 or tokens, hidden).

        Returns:
            norm(residual) * (1 + scale) + shift, and residual = hidden_states + gate * update.
        """
        return adaln(
            hidden_states,
            scale,
            shift,
            self.eps,
            update=update,
            gate=gate,
            weight=self.weight,
            bias=self.bias,
        )


class AdaLNModulation(nn.Module):
    """Condition (..., hidden) to `num_chunks` vectors, (..., num_chunks, hidden), by SiLU and one linear layer."""

    def __init__(self, condition_size: int, hidden_size: int, num_chunks: int):
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(condition_size, num_chunks * hidden_size)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        return linear(self.linear, F.silu(condition)).unflatten(-1, (self.num_chunks, -1))


class AdaLNTable(nn.Module):
    """A layer's own offsets (num_chunks, hidden) to a modulation that all layers share."""

    def __init__(self, hidden_size: int, num_chunks: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_chunks, hidden_size))

    def forward(self, shared: torch.Tensor) -> torch.Tensor:
        return self.table + shared


class AdaLNOutput(nn.Module):
    """
    The norm in front of a head, scaled and shifted by the condition, of the whole sequence (batch, hidden) or of each
    token (batch, tokens, hidden); float32 inside.
    """

    def __init__(self, condition_size: int, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.linear = nn.Linear(condition_size, 2 * hidden_size)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        modulation = linear(self.linear, F.silu(condition)).float()
        if modulation.ndim < hidden_states.ndim:
            modulation = modulation.unsqueeze(1)
        scale, shift = modulation.chunk(2, dim=-1)
        return modulated_norm(hidden_states, scale, shift, self.eps, condition.dtype)
