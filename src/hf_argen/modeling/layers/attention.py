"""Attention through transformers' interface, so that every `attn_implementation` works in every family."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...generation._compat import attention_implementation
from ...generation.cache import PreallocatedCache, TreeView
from ...kernels.qk_norm_rope import qk_norm_rope, runs_here
from ...kernels.tree_attention import tree_attention
from .linear import linear, linears


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Plain attention; query, key and value are (batch, heads, length, head_dim), the mask is additive. A module with
    `num_key_value_groups` has so many heads of queries for each of keys and values.
    """
    if (groups := getattr(module, "num_key_value_groups", 1)) > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def tree_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree: TreeView | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention of the last nodes of a cache by `kernels.tree_attention`, for transformers' interface; without a tree, as in a
    prompt or in training, sdpa.
    """
    if tree is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    starts, ancestors, nodes, hidden = tree.to(query.device)
    attended = tree_attention(query, key, value, starts, ancestors, nodes, hidden, scaling)
    return attended.transpose(1, 2), None


AttentionInterface.register("tree_attention", tree_attention_forward)


def attention_function(implementation: str) -> Callable:
    """The function behind `config._attn_implementation`; returns outputs as (batch, length, heads, head_dim)."""
    return eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]


class HeadedAttention(nn.Module):
    """
    What self-attention shares that projects to heads, changes queries and keys in its own way, and attends.

    The module has `q_proj`, `k_proj`, `v_proj`, `o_proj`, `dropout`, `head_dim`, `scaling`, `layer_idx`, and `config` with
    `attention_dropout`.
    """

    num_key_value_groups = 1  # transformers asks for it, and takes its time where it is missing

    def heads(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value (batch, heads, length, head_dim) of (batch, length, hidden_size)."""
        batch, n = hidden_states.shape[:2]
        parts = self._modules  # see `linears`
        query, key, value = linears(hidden_states, parts["q_proj"], parts["k_proj"], parts["v_proj"])
        if n == 1:  # one token a step: calls count
            shape = (batch, -1, 1, self.head_dim)
            return query.view(shape), key.view(shape), value.view(shape)
        shape = (batch, n, -1, self.head_dim)
        return (
            query.view(shape).transpose(1, 2),
            key.view(shape).transpose(1, 2),
            value.view(shape).transpose(1, 2),
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **preparation: Any,
    ) -> torch.Tensor:
        """
        Attention over these and the cached positions, projected, (batch, length, hidden_size).

        Args:
            preparation: what happens to queries and keys before: norm, scale and rotation, see `kernels.qk_norm_rope`.
        """
        tree = None
        if isinstance(past_key_values, PreallocatedCache):
            tree, layer = past_key_values.tree, past_key_values.layers[self.layer_idx]
            query, _ = qk_norm_rope(query, key, value, slot=layer.claim(key, value), **preparation)
            key, value = layer.filled()
        else:
            if preparation:
                query, key = qk_norm_rope(query, key, **preparation)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        function = attention_function(
            attention_implementation(self.config) if tree is None else "tree_attention"
        )
        if attention_mask is None and function is sdpa_attention_forward and self._sees_all(query):
            attended = F.scaled_dot_product_attention(query, key, value, scale=self.scaling)
            attended = attended.reshape(query.shape[0], 1, -1)
        else:
            attended, _ = function(
                self,
                query,
                key,
                value,
                attention_mask,
                scaling=self.scaling,
                dropout=self.config.attention_dropout if self.training else 0.0,
                **({} if tree is None else {"tree": tree}),
            )
            attended = attended.flatten(2)
        output = linear(self._modules["o_proj"], attended)
        # At one token a step, calls of modules count.
        return self.dropout(output) if self.training else output

    def _sees_all(self, query: torch.Tensor) -> bool:
        """Whether sdpa needs nothing said for this query: one token without mask; at one token a step, calls count."""
        return query.shape[2] == 1 and not self.training and self.num_key_value_groups == 1


def fused_layer_norms(
    query: torch.Tensor, query_norm: nn.LayerNorm, key_norm: nn.LayerNorm
) -> dict[str, Any]:
    """
    The weights of two norms as `preparation` of [`HeadedAttention.attend`], where a kernel does their work; empty where the
    modules have to be called: there is no kernel, their weights are elsewhere (offloaded, sharded), or gradients are
    needed, which tensor parallelism adds up where a module is called.
    """
    if torch.is_grad_enabled() or not runs_here(query):
        return {}
    weights = (query_norm.weight, key_norm.weight)
    if any(one.device != query.device or hasattr(one, "to_local") for one in weights):
        return {}
    return {
        "norm": "layer",
        "eps": query_norm.eps,
        "query_weight": query_norm.weight,
        "key_weight": key_norm.weight,
        "query_bias": query_norm.bias,
        "key_bias": key_norm.bias,
    }


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """Of a parameter with one value per head, those of the heads on this device; under tensor parallelism it is split."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def block_index(lengths: list[int], device: torch.device) -> torch.Tensor:
    """Index of the block that each token belongs to, (sum(lengths),) int64."""
    blocks = torch.arange(len(lengths), device=device)
    return torch.repeat_interleave(blocks, torch.tensor(lengths, device=device), output_size=sum(lengths))


def block_causal_mask(
    lengths: list[int], dtype: torch.dtype, device: torch.device, first_query: int = 0
) -> torch.Tensor | None:
    """
    Additive mask (1, 1, queries, keys) under which a token sees its own block and all blocks before it.

    Args:
        lengths: tokens per block, in order; the keys are all of them.
        first_query: index of the block at which the queries start.

    Returns:
        `None` when nothing would be masked, which lets attention kernels take their fast path.
    """
    if first_query == len(lengths) - 1:
        return None
    block = block_index(lengths, device)
    hidden = block[sum(lengths[:first_query]) :, None] < block[None, :]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[None, None]


def causal_part(states: torch.Tensor, length: int, mask: torch.Tensor | None) -> torch.Tensor:
    """
    Additive mask (batch or 1, 1, n, length) of the last n of `length` positions, each of which sees those before it and itself,
    but none that `mask` hides.

    Args:
        states: (batch, n, hidden_size) of the queries.
        mask: additive, (batch, 1, 1, length).
    """
    n, device = states.shape[1], states.device
    queries = torch.arange(length - n, length, device=device)[:, None]
    keys = torch.arange(length, device=device)
    lowest = torch.finfo(states.dtype).min
    causal = torch.zeros(n, length, dtype=states.dtype, device=device).masked_fill_(keys > queries, lowest)
    if mask is None:
        return causal[None, None]
    hidden = (mask < 0) & (keys != queries)
    return causal.masked_fill(hidden, lowest)


def causal_mask(
    length: int, hidden: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """
    Additive mask (batch or 1, 1, length, length) under which a token sees itself and what comes before it.

    Args:
        hidden: (batch, n) bool, those of the first `n` positions that no one sees but themselves (padding).
    """
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
    if hidden is not None:
        padded = F.pad(hidden, (0, length - hidden.shape[1]))
        seen = (seen & ~padded[:, None]) | torch.eye(length, dtype=torch.bool, device=device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
