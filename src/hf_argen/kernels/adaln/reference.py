"""Norm with modulation behind a gated residual, in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F


def adaln(
    hidden_states: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    update: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rms: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`hf_argen.kernels.adaln.adaln`]."""
    residual = hidden_states if update is None else gated_residual(hidden_states, update, gate)
    states = residual
    if scale is not None and scale.dtype != residual.dtype:
        states = residual.to(torch.promote_types(residual.dtype, scale.dtype))
    if rms:
        normed = torch.rms_norm(states, states.shape[-1:], None, eps)
        normed = normed if weight is None else normed * weight
    else:
        normed = F.layer_norm(states, states.shape[-1:], weight, bias, eps)
    if scale is not None:
        normed = torch.addcmul(shift, normed, scale + 1)
    return normed if dtype is None else normed.to(dtype), residual


def gated_residual(
    hidden_states: torch.Tensor, update: torch.Tensor, gate: torch.Tensor | None
) -> torch.Tensor:
    """hidden_states + gate * update; one elementwise operation, which no kernel does better."""
    return hidden_states + update if gate is None else torch.addcmul(hidden_states, update, gate)
