"""The small network that heads of continuous tokens share: an MLP whose blocks a condition modulates (arXiv 2406.11838)."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ..layers.linear import linear
from ..layers.precision import suited

FREQUENCIES = 256  # sines and cosines together
LONGEST_PERIOD = 10_000
NORM_EPS = 1e-6


def sinusoidal(times: torch.Tensor) -> torch.Tensor:
    """Times (n,) as cosines and sines of falling frequencies, (n, 256) float32."""
    half = FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=times.device)
    frequencies = torch.exp(-math.log(LONGEST_PERIOD) * exponents / half)
    angles = times[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Times (n,) to vectors (n, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.silu(self.fc1(suited(sinusoidal(times), self.fc1))))


class ModulatedBlock(nn.Module):
    """Residual block of two layers; scale, shift and gate come from the condition, to which SiLU was applied already."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(
        self, hidden_states: torch.Tensor, activated: torch.Tensor, shift_scale: float = 1.0
    ) -> torch.Tensor:
        shift, scale, gate = linear(self.modulation, activated).chunk(3, dim=-1)
        if shift_scale != 1.0:
            shift = shift_scale * shift
        inner = self.norm(hidden_states) * (1 + scale) + shift
        return hidden_states + gate * linear(self.fc2, F.silu(linear(self.fc1, inner)))


class ModulatedOutput(nn.Module):
    """Norm without weights of its own, modulated by the condition, then a linear layer."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, out_channels)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, hidden_states: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        shift, scale = linear(self.modulation, activated).chunk(2, dim=-1)
        normed = F.layer_norm(hidden_states, (self.width,), eps=NORM_EPS)
        return self.linear(normed * (1 + scale) + shift)


class AdaLNMLP(nn.Module):
    """
    Noisy tokens, a time and a hidden state each to what the head wants to know.

    Args:
        in_channels, out_channels: of a token, and of the answer.
        hidden_size: of the hidden states.
        width, depth: of the network; residual blocks.
        num_times: times that are embedded, each by an embedding of its own; may be 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_size: int,
        width: int,
        depth: int,
        num_times: int = 1,
    ):
        super().__init__()
        self.time_embeddings = nn.ModuleList(TimeEmbedding(width) for _ in range(num_times))
        self.condition_proj = nn.Linear(hidden_size, width)
        self.input_proj = nn.Linear(in_channels, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(depth))
        self.output = ModulatedOutput(width, out_channels)

    @torch.no_grad()
    def init_weights(self) -> None:
        """The authors' scheme: every block starts as the identity, and the answer is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init.xavier_uniform_(module.weight)
                init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                init.ones_(module.weight)
                init.zeros_(module.bias)
        for embedding in self.time_embeddings:
            init.normal_(embedding.fc1.weight, std=0.02)
            init.normal_(embedding.fc2.weight, std=0.02)
        for block in self.blocks:
            init.zeros_(block.modulation.weight)
        for layer in (self.output.modulation, self.output.linear):
            init.zeros_(layer.weight)

    def embed_times(self, *times: torch.Tensor) -> torch.Tensor:
        """Times (n,), one tensor for each embedding, to their sum (n, width)."""
        embedded = [embed(one) for embed, one in zip(self.time_embeddings, times, strict=True)]
        return embedded[0] if len(embedded) == 1 else torch.stack(embedded).sum(dim=0)

    def embed_condition(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., hidden_size) to (..., width)."""
        return self.condition_proj(suited(hidden, self.condition_proj))

    def forward(
        self,
        tokens: torch.Tensor,
        times: torch.Tensor | None,
        condition: torch.Tensor,
        shift_scale: float = 1.0,
    ) -> torch.Tensor:
        """
        Args:
            tokens: (n, in_channels); where `condition` has more rows, a whole multiple of n, they are repeated.
            times: (n or 1, width) from `embed_times`, if there are any.
            condition: (rows, width) from `embed_condition`.
            shift_scale: factor on the shifts of the blocks.

        Returns:
            (rows, out_channels) float32.
        """
        hidden_states = self.input_proj(suited(tokens, self.input_proj))
        if len(condition) != len(hidden_states):
            hidden_states = hidden_states.repeat(len(condition) // len(hidden_states), 1)
        activated = F.silu(condition if times is None else times + condition)
        for block in self.blocks:
            hidden_states = block(hidden_states, activated, shift_scale)
        return self.output(hidden_states, activated).float()
