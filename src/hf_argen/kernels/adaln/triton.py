"""Norm with modulation behind a gated residual: one program reads and writes a row once."""

from typing import Any

import torch
import triton
import triton.language as tl

from ..library import on_its_device
from ..variants import OPTIONS, Variant

MAX_HIDDEN = 4096  # a row stays in registers, in the backward pass eight rows of intermediate values


@triton.jit
def forward_kernel(
    x, update, gate, weight, bias, scale, shift, normed, residual, mean, rstd,
    tokens, hidden, eps,
    gate_row, gate_token, scale_row, scale_token, shift_row, shift_token,
    RMS: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    channel = tl.arange(0, BLOCK)
    inside = channel < hidden
    states = tl.load(x + row * hidden + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        added = tl.load(update + row * hidden + channel, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            place = batch * gate_row + token * gate_token
            added *= tl.load(gate + place + channel, mask=inside, other=0.0).to(tl.float32)
        states += added
        tl.store(residual + row * hidden + channel, states.to(residual.dtype.element_ty), mask=inside)
        states = states.to(residual.dtype.element_ty).to(tl.float32)  # what later layers see
    if RMS:
        centre = 0.0
        centred = states
    else:
        centre = tl.sum(states, axis=0) / hidden
        centred = tl.where(inside, states - centre, 0.0)
        tl.store(mean + row, centre)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / hidden + eps)
    tl.store(rstd + row, factor)
    result = centred * factor
    if HAS_WEIGHT:
        result *= tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_MODULATION:
        place = batch * scale_row + token * scale_token
        result *= 1.0 + tl.load(scale + place + channel, mask=inside, other=0.0).to(tl.float32)
        place = batch * shift_row + token * shift_token
        result += tl.load(shift + place + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * hidden + channel, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _row_backward(
    d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd, dx, d_update,
    batch, token, tokens, hidden, gate_row, gate_token, scale_row, scale_token,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a row; gives its part of those of gate, weight, bias, scale and shift."""
    channel = tl.arange(0, BLOCK)
    inside = channel < hidden
    for_gate = tl.zeros([BLOCK], tl.float32)
    for_weight = tl.zeros([BLOCK], tl.float32)
    for_bias = tl.zeros([BLOCK], tl.float32)
    for_scale = tl.zeros([BLOCK], tl.float32)
    for_shift = tl.zeros([BLOCK], tl.float32)
    row = batch * tokens + token
    grad = tl.load(d_normed + row * hidden + channel, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(rstd + row)
    unit = tl.load(residual + row * hidden + channel, mask=inside, other=0.0).to(tl.float32)
    if not RMS:
        unit -= tl.load(mean + row)
    unit = tl.where(inside, unit * factor, 0.0)
    if HAS_WEIGHT:
        weights = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_MODULATION:
        before = unit
        if HAS_WEIGHT:
            before *= weights
        if HAS_BIAS:
            before += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        for_scale = grad * before
        for_shift = grad
        place = batch * scale_row + token * scale_token
        grad *= 1.0 + tl.load(scale + place + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        for_bias = grad
    if HAS_WEIGHT:
        for_weight = grad * unit
        grad *= weights
    along = tl.sum(grad * unit, axis=0) / hidden
    grad -= unit * along
    if not RMS:
        grad -= tl.where(inside, tl.sum(grad, axis=0) / hidden, 0.0)
    grad *= factor
    if HAS_RESIDUAL:
        grad += tl.load(d_residual + row * hidden + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * hidden + channel, grad.to(dx.dtype.element_ty), mask=inside)
    if HAS_GATE:
        for_gate = grad * tl.load(update + row * hidden + channel, mask=inside, other=0.0).to(tl.float32)
        place = batch * gate_row + token * gate_token
        grad *= tl.load(gate + place + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_update + row * hidden + channel, grad.to(d_update.dtype.element_ty), mask=inside)
    return for_gate, for_weight, for_bias, for_scale, for_shift


@triton.jit
def backward_kernel(
    d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd,
    dx, d_update, d_gate, d_weight, d_bias, d_scale, d_shift,
    tokens, hidden, gate_row, gate_token, scale_row, scale_token,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of its rows, and the sums over them for what the rows share; those have a row for each program."""
    batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, BLOCK)
    inside = channel < hidden
    if ROWS == 1:
        for_gate, for_weight, for_bias, for_scale, for_shift = _row_backward(
            d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd, dx, d_update,
            batch, part, tokens, hidden, gate_row, gate_token, scale_row, scale_token,
            RMS, HAS_RESIDUAL, HAS_GATE, HAS_WEIGHT, HAS_BIAS, HAS_MODULATION, BLOCK,
        )  # fmt: skip
    else:
        for_gate = tl.zeros([BLOCK], tl.float32)
        for_weight = tl.zeros([BLOCK], tl.float32)
        for_bias = tl.zeros([BLOCK], tl.float32)
        for_scale = tl.zeros([BLOCK], tl.float32)
        for_shift = tl.zeros([BLOCK], tl.float32)
        for token in range(part * ROWS, tl.minimum(part * ROWS + ROWS, tokens)):
            one_gate, one_weight, one_bias, one_scale, one_shift = _row_backward(
                d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd, dx, d_update,
                batch, token, tokens, hidden, gate_row, gate_token, scale_row, scale_token,
                RMS, HAS_RESIDUAL, HAS_GATE, HAS_WEIGHT, HAS_BIAS, HAS_MODULATION, BLOCK,
            )  # fmt: skip
            for_gate += one_gate
            for_weight += one_weight
            for_bias += one_bias
            for_scale += one_scale
            for_shift += one_shift
    place = (batch * tl.num_programs(1) + part) * hidden + channel
    if HAS_GATE:
        tl.store(d_gate + place, for_gate, mask=inside)
    if HAS_WEIGHT:
        tl.store(d_weight + place, for_weight, mask=inside)
    if HAS_BIAS:
        tl.store(d_bias + place, for_bias, mask=inside)
    if HAS_MODULATION:
        tl.store(d_scale + place, for_scale, mask=inside)
        tl.store(d_shift + place, for_shift, mask=inside)


def num_warps(block: int, rows: int = 1) -> int:
    """Eight values of a row for each thread, 16 of the longest rows, two where sums over several rows stand beside them."""
    return min(max(block // 256, 1), 8) if rows == 1 else min(max(block // 64, 1), 16)


def rows_of_program(block: int, per_token: bool) -> int:
    """Of the backward pass. The sums over rows do not fit into registers beside the longest rows."""
    return 1 if per_token or block > 2048 else 16


def _strides(modulation: torch.Tensor | None) -> tuple[int, int]:
    """Of rows and tokens of (batch, 1 or tokens, hidden); 0 where all tokens share one."""
    if modulation is None:
        return 0, 0
    return modulation.stride(0), 0 if modulation.shape[1] == 1 else modulation.stride(1)


@on_its_device
def forward(
    x: torch.Tensor,
    update: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    rms: bool,
    outputs: tuple[torch.Tensor, ...],
) -> None:
    """Fills `outputs`: normed, residual (without `update` not touched), mean (with `rms` not touched), 1 / deviation."""
    batch, tokens, hidden = x.shape
    if x.numel() == 0:
        return
    block = triton.next_power_of_2(hidden)
    forward_kernel[(batch * tokens,)](
        x, update, gate, weight, bias, scale, shift, *outputs,
        tokens, hidden, eps, *_strides(gate), *_strides(scale), *_strides(shift),
        RMS=rms, HAS_UPDATE=update is not None, HAS_GATE=gate is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, HAS_MODULATION=scale is not None, BLOCK=block,
        num_warps=num_warps(block), **OPTIONS,
    )  # fmt: skip


@on_its_device
def backward(
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
    dx: torch.Tensor,
    d_update: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Fills `dx` and, with `gate`, `d_update`; returns sums (batch, parts, hidden) of gate, weight, bias, scale, shift."""
    batch, tokens, hidden = residual.shape
    per_token = any(one is not None and one.shape[1] > 1 for one in (gate, scale))
    block = triton.next_power_of_2(hidden)
    rows = rows_of_program(block, per_token)
    parts = triton.cdiv(tokens, rows)
    wanted = (gate, weight, bias, scale, scale)
    # A tensor without elements stands for one that is not there, since an operation returns no None.
    sums = tuple(
        residual.new_empty(batch, parts, hidden if one is not None else 0, dtype=torch.float32)
        for one in wanted
    )
    if residual.numel() == 0:
        return sums
    backward_kernel[(batch, parts)](
        d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd,
        dx, d_update, *sums, tokens, hidden, *_strides(gate), *_strides(scale),
        RMS=rms, HAS_RESIDUAL=d_residual is not None, HAS_GATE=gate is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, HAS_MODULATION=scale is not None, ROWS=rows, BLOCK=block,
        num_warps=num_warps(block, rows), **OPTIONS,
    )  # fmt: skip
    return sums


def variants() -> list[Variant]:
    """
    VAR (layer norm, modulation, gate), RAR (with weights and a modulation for each token, and as it would be with one for
    all), LlamaGen (RMS norm behind a sum), and the widest rows.
    """
    everything = {
        "RMS": False,
        "HAS_GATE": True,
        "HAS_WEIGHT": True,
        "HAS_BIAS": True,
        "HAS_MODULATION": True,
    }
    plain = {**everything, "HAS_WEIGHT": False, "HAS_BIAS": False}
    rms = {"RMS": True, "HAS_GATE": False, "HAS_WEIGHT": True, "HAS_BIAS": False, "HAS_MODULATION": False}
    forms = [
        ("VAR-d16", 1024, False, plain),
        ("RAR-XL", 1280, True, everything),
        ("LlamaGen-XXL", 1536, False, rms),
        ("4096 channels", MAX_HIDDEN, False, everything),
    ]
    aheads = [
        Variant(f"{label}, forward", forward_kernel, _types(forward_kernel),
                {**form, "HAS_UPDATE": True, "BLOCK": triton.next_power_of_2(hidden)},
                num_warps(triton.next_power_of_2(hidden)))
        for label, hidden, _, form in forms
    ]  # fmt: skip
    forms += [("VAR-d36", 2304, False, plain), ("RAR-XL, one modulation", 1280, False, everything)]
    backs = [
        Variant(f"{label}, backward", backward_kernel, _types(backward_kernel),
                {**form, "HAS_RESIDUAL": True, "ROWS": rows_of_program(block, per_token), "BLOCK": block},
                num_warps(block, rows_of_program(block, per_token)))
        for label, hidden, per_token, form in forms
        for block in [triton.next_power_of_2(hidden)]
    ]  # fmt: skip
    return [*aheads, *backs]


def _types(kernel: Any) -> dict[str, str]:
    """Of the arguments that are no constants: states and modulations in bfloat16, sums in float32."""
    integers = {
        "tokens",
        "hidden",
        *(f"{one}_{dim}" for one in ("gate", "scale", "shift") for dim in ("row", "token")),
    }
    sums = {"mean", "rstd", "d_gate", "d_weight", "d_bias", "d_scale", "d_shift"}
    types = {}
    for name in kernel.arg_names:
        if name in integers:
            types[name] = "i32"
        elif name == "eps":
            types[name] = "fp32"
        elif name.islower():
            types[name] = "*fp32" if name in sums else "*bf16"
    return types
