"""Norm of queries and keys, rotary embedding and the write into the cache, in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F

from .rotation import Rotation


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    norm: str | None = None,
    eps: float = 1e-6,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`hf_argen.kernels.qk_norm_rope.qk_norm_rope`]."""
    if norm is not None:
        query = normed(query, norm, eps, query_weight, query_bias)
        key = normed(key, norm, eps, key_weight, key_bias)
    if query_scale is not None:
        query = query * query_scale.view(1, -1, 1, 1)
    if rotation is None:
        return query, key
    if query.shape == key.shape:  # both at once: at one token a step, the number of calls counts
        query, key = rotation.apply(torch.stack((query, key))).unbind()
        return query, key
    return rotation.apply(query), rotation.apply(key)


def normed(
    states: torch.Tensor, norm: str, eps: float, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Over the last dimension."""
    if norm == "l2":
        return F.normalize(states, dim=-1, eps=eps)
    if norm == "layer":
        return F.layer_norm(states, states.shape[-1:], weight, bias, eps)
    result = torch.rms_norm(states, states.shape[-1:], None, eps)
    return result if weight is None else result * weight


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor | None,
    start: int,
) -> None:
    """Writes (batch, heads, n, head_dim) into the cache, from `start` on or to the `places` (batch, n) of each row."""
    for cache, new in ((keys, key), (values, value)):
        if places is None:
            cache[:, :, start : start + new.shape[2]] = new
        else:
            # No scatter_: compiled, that copies the whole cache first, which an assignment does not.
            rows = torch.arange(len(new), device=cache.device)[:, None]
            cache[rows, :, places.to(cache.device)] = new.transpose(1, 2).to(cache.dtype)
