"""The transformer block of vision transformers: a norm in front of each part, attention to all positions (arXiv 2010.11929)."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import HeadedAttention
from .mlp import MLP


class FullAttention(HeadedAttention):
    """
    Multi-head self-attention over all positions.

    Args:
        config: with `hidden_dropout`, `attention_dropout` and the attention implementation.
        layer_idx: place of its keys and values in a cache.
        qkv_bias: of the projections to query, key and value.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_attention_heads: int,
        layer_idx: int = 0,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        return self.attend(*self.heads(hidden_states), attention_mask, past_key_values)


class CrossAttention(FullAttention):
    """Attention to the tokens of a caption (batch, n, config.hidden_size)."""

    def __init__(self, config: Any, hidden_size: int, num_attention_heads: int):
        super().__init__(config, hidden_size, num_attention_heads)
        self.k_proj = nn.Linear(config.hidden_size, hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None
    ) -> torch.Tensor:
        query, key, value = (
            proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj, states in ((self.q_proj, hidden_states), (self.k_proj, text), (self.v_proj, text))
        )
        return self.attend(query, key, value, text_mask, None)


class PreNormLayer(GradientCheckpointingLayer):
    """
    Attention, attention to a caption where `reads_text`, and feed-forward block, each behind a norm.

    Args:
        config: as for [`FullAttention`], with `hidden_act` and `layer_norm_eps`; where text is read, its `hidden_size`.
        qkv_bias: see [`FullAttention`].
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        reads_text: bool = False,
        layer_idx: int = 0,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden_size, config.layer_norm_eps)
        self.self_attn = FullAttention(config, hidden_size, num_attention_heads, layer_idx, qkv_bias)
        self.reads_text = reads_text
        if reads_text:
            self.text_layernorm = nn.LayerNorm(hidden_size, config.layer_norm_eps)
            self.cross_attn = CrossAttention(config, hidden_size, num_attention_heads)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, config.layer_norm_eps)
        dropout = config.hidden_dropout
        self.mlp = MLP(hidden_size, intermediate_size, config.hidden_act, dropout, inner_dropout=dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, attention_mask, past_key_values)
        if self.reads_text:
            normed = self.text_layernorm(hidden_states)
            hidden_states = hidden_states + self.cross_attn(normed, text, text_mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LongSkipLayer(PreNormLayer):
    """As [`PreNormLayer`], joined with the output of the layer that lies as far from the other end (U-ViT, arXiv 2209.12152)."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        qkv_bias: bool = True,
    ):
        super().__init__(config, hidden_size, num_attention_heads, intermediate_size, qkv_bias=qkv_bias)
        self.skip_proj = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Hidden states and those of the other layer, both (batch, n, hidden_size)."""
        return super().forward(self.skip_proj(torch.cat([hidden_states, skipped], dim=-1)))
