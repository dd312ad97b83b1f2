"""The transformer block of BERT: a norm behind each part (arXiv 1810.04805)."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .mlp import MLP
from .prenorm import FullAttention


class PostNormLayer(GradientCheckpointingLayer):
    """
    Attention to all positions and feed-forward block; what each adds is normed together with what it was added to.

    Args:
        config: as for [`FullAttention`], with `hidden_act` and `layer_norm_eps`.
    """

    def __init__(self, config: Any, hidden_size: int, num_attention_heads: int, intermediate_size: int):
        super().__init__()
        self.self_attn = FullAttention(config, hidden_size, num_attention_heads)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, config.layer_norm_eps)
        self.mlp = MLP(hidden_size, intermediate_size, config.hidden_act, config.hidden_dropout)
        self.output_layernorm = nn.LayerNorm(hidden_size, config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (batch, n, hidden_size), and an additive mask."""
        attended = self.self_attn(hidden_states, attention_mask)
        hidden_states = self.post_attention_layernorm(hidden_states + attended)
        return self.output_layernorm(hidden_states + self.mlp(hidden_states))
