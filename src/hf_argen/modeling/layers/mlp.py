"""Position-wise feed-forward blocks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import get_activation

from .linear import linear, linears


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """That of transformers; of the usual one the function alone: at one token a step, calls of modules count."""
    return F.silu if name in ("silu", "swish") else get_activation(name)


class MLP(nn.Module):
    """
    fc2(act(fc1(x))), (..., hidden_size) to the same shape.

    Args:
        dropout: of the output.
        inner_dropout: between the activation and `fc2`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        dropout: float = 0.0,
        inner_dropout: float = 0.0,
    ):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act = activation(hidden_act)
        self.inner_dropout = nn.Dropout(inner_dropout)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.act(linear(self._modules["fc1"], hidden_states))  # see `linears`
        if not self.training:
            return linear(self._modules["fc2"], inner)
        return self.dropout(self.fc2(self.inner_dropout(inner)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) without biases (arXiv 2002.05202), (..., hidden_size) to the same shape."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, dropout: float = 0.0):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.act = activation(hidden_act)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        parts = self._modules  # see `linears`
        gate, up = linears(hidden_states, parts["gate_proj"], parts["up_proj"])
        output = linear(parts["down_proj"], self.act(gate) * up)
        return self.dropout(output) if self.training else output
