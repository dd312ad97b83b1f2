"""
Layer or RMS norm with modulation, behind a gated residual (DiT, arXiv 2212.09748): what stands between the attention
and the feed-forward block of a conditional transformer.
"""

import torch

from .. import checks
from ..dispatch import may_run, runs_kernel
from ..library import NAMESPACE, contiguous_rows
from . import reference
from .reference import gated_residual

__all__ = ["adaln", "gated_residual"]

NAME = "adaln"
MAX_HIDDEN = 4096  # of the kernel; wider rows take the reference


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
    """
    residual = hidden_states + gate * update; normed = norm(residual) * (1 + scale) + shift.

    Args:
        hidden_states: (batch, tokens, hidden), float32, bfloat16 or float16; of any rank without modulation and gate.
        scale, shift: (batch or 1, 1 or tokens, hidden), both or neither. The reference computes the norm in the wider dtype
            of these and the states, the kernel always in float32.
        update, gate: like `hidden_states`, the output of a block, and (batch or 1, 1 or tokens, hidden); without `gate` it
            is added as it is, without `update` the residual is `hidden_states` itself.
        weight, bias: (hidden,), of the norm; RMS norms have no bias.
        rms: x / sqrt(mean(x^2) + eps) (arXiv 1910.07467) in place of the layer norm.
        dtype: of `normed`; default: the wider one of those of `hidden_states` and `scale`.

    Returns:
        normed and residual, (batch, tokens, hidden). Both have gradients.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, where the kernel runs; the reference raises what PyTorch does.
    """
    if not may_run(hidden_states) or not _runs_here(hidden_states):
        return reference.adaln(
            hidden_states, scale, shift, eps,
            update=update, gate=gate, weight=weight, bias=bias, rms=rms, dtype=dtype,
        )  # fmt: skip
    shape = hidden_states.shape
    if hidden_states.ndim != 3 and scale is None and gate is None:
        hidden_states, update = (
            None if one is None else one.reshape(1, -1, shape[-1]) for one in (hidden_states, update)
        )
    scale, shift, gate = (_for_each_row(one, len(hidden_states)) for one in (scale, shift, gate))
    _check(hidden_states, scale, shift, update, gate, weight, bias, rms)
    if dtype is None:
        dtype = hidden_states.dtype
        if scale is not None:
            dtype = torch.promote_types(dtype, scale.dtype)
    normed, residual, _, _ = _operation(
        hidden_states, update, gate, weight, bias, scale, shift, eps, rms, dtype
    )
    residual = hidden_states if update is None else residual
    return normed.view(shape), residual if residual.shape == shape else residual.view(shape)


def _runs_here(hidden_states: torch.Tensor) -> bool:
    rows, hidden = hidden_states.shape[:-1].numel(), hidden_states.shape[-1]
    return hidden <= MAX_HIDDEN and runs_kernel(hidden_states, NAME, rows=rows, hidden=hidden)


def _for_each_row(modulation: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """A modulation of one row for all rows of the batch."""
    if modulation is None or modulation.ndim != 3 or len(modulation) != 1:
        return modulation
    return modulation.expand(batch, -1, -1)


def _check(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms: bool,
) -> None:
    given = {"hidden_states": x, "scale": scale, "shift": shift, "update": update, "gate": gate}
    given |= {"weight": weight, "bias": bias}
    checks.same_device(NAME, **given)
    checks.dtypes(NAME, checks.FLOATS, **given)
    checks.shape(NAME, "hidden_states", x, None, None, None)
    batch, tokens, hidden = x.shape
    if (scale is None) != (shift is None):
        raise ValueError(f"{NAME}: scale and shift come together; give both or neither.")
    if gate is not None and update is None:
        raise ValueError(f"{NAME}: a gate came without an update; give what it shall gate.")
    if rms and bias is not None:
        raise ValueError(f"{NAME}: an RMS norm has no bias; leave it out, or take rms=False.")
    checks.shape(NAME, "update", update, batch, tokens, hidden)
    for name in ("scale", "shift", "gate"):
        one = given[name]
        checks.shape(
            NAME,
            name,
            one,
            batch,
            1 if one is not None and one.ndim == 3 and one.shape[1] == 1 else tokens,
            hidden,
        )
    for name in ("weight", "bias"):
        checks.shape(NAME, name, given[name], hidden)


@torch.library.custom_op(f"{NAMESPACE}::adaln", mutates_args=())
def _operation(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import triton

    outputs = _outputs(x, update, gate, weight, bias, scale, shift, eps, rms, dtype)
    x, update = x.contiguous(), None if update is None else update.contiguous()
    gate, scale, shift, weight, bias = (contiguous_rows(one) for one in (gate, scale, shift, weight, bias))
    triton.forward(x, update, gate, weight, bias, scale, shift, eps, rms, outputs)
    return outputs


@_operation.register_fake
def _outputs(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Without `update` the residual, and for RMS norms the mean, have no elements: no output may be an input."""
    shape = x.shape
    residual = x.new_empty(shape if update is not None else (0,))
    mean = x.new_empty((0,) if rms else shape[:2], dtype=torch.float32)
    return x.new_empty(shape, dtype=dtype), residual, mean, x.new_empty(shape[:2], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::adaln_backward", mutates_args=())
def _backward_operation(
    d_normed: torch.Tensor,
    d_residual: torch.Tensor | None,
    residual: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, update (no elements without gate), gate, weight, bias, scale and shift."""
    from . import triton

    outputs = _gradients(d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd, rms)
    sums = triton.backward(
        d_normed.contiguous(),
        None if d_residual is None else d_residual.contiguous(),
        residual.contiguous(),
        None if update is None else update.contiguous(),
        contiguous_rows(gate),
        contiguous_rows(weight),
        contiguous_rows(bias),
        contiguous_rows(scale),
        mean,
        rstd,
        rms,
        outputs[0],
        outputs[1],
    )
    shared = [_summed(total, output) for total, output in zip(sums, outputs[2:], strict=True)]
    return (*outputs[:2], *shared)


def _summed(total: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sums (batch, parts, hidden) in the shape and dtype of the gradient."""
    if like.ndim == 1:
        return total.sum(dim=(0, 1)).to(like.dtype) if like.numel() else like
    if like.shape[1] == 1:
        total = total.sum(dim=1, keepdim=True)
    return total.to(like.dtype)


@_backward_operation.register_fake
def _gradients(
    d_normed: torch.Tensor,
    d_residual: torch.Tensor | None,
    residual: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    rms: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def like(one: torch.Tensor | None) -> torch.Tensor:
        return residual.new_empty((0,)) if one is None else one.new_empty(one.shape)

    return (
        residual.new_empty(residual.shape),
        like(update if gate is not None else None),
        like(gate),
        like(weight),
        like(bias),
        like(scale),
        like(scale),
    )


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, update, gate, weight, bias, scale, _, _, ctx.rms, _ = inputs
    _, residual, mean, rstd = output
    ctx.has_update = update is not None
    ctx.save_for_backward(
        residual if ctx.has_update else x,
        update if gate is not None else None,
        gate,
        weight,
        bias,
        scale,
        mean,
        rstd,
    )


def _backward(ctx, d_normed, d_residual, d_mean, d_rstd):  # type: ignore[no-untyped-def]
    residual, update, gate, weight, bias, scale, mean, rstd = ctx.saved_tensors
    if not ctx.has_update:
        d_residual = None
    gradients = _backward_operation(
        d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd, ctx.rms
    )
    dx, d_update, d_gate, d_weight, d_bias, d_scale, d_shift = gradients
    if ctx.has_update and gate is None:
        d_update = dx
    return (
        dx,
        d_update if ctx.has_update else None,
        None if gate is None else d_gate,
        None if weight is None else d_weight,
        None if bias is None else d_bias,
        None if scale is None else d_scale,
        None if scale is None else d_shift,
        None,
        None,
        None,
    )


torch.library.register_autograd(f"{NAMESPACE}::adaln", _backward, setup_context=_keep)
