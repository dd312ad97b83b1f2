"""Norm with modulation behind a gated residual: one program reads and writes a row once."""

import torch
import triton
import triton.language as tl

from ..variants import OPTIONS, Variant, warps

MAX_HIDDEN = 4096  # a row stays in registers, in the backward pass eight rows of intermediate values
ROWS = 16  # that one program of the backward pass sums up


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
def backward_kernel(
    d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd,
    dx, d_update, d_gate, d_weight, d_bias, d_scale, d_shift,
    tokens, hidden, rows_of_program,
    gate_row, gate_token, scale_row, scale_token,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_GATE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MODULATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of its rows, and the sums over them for what the rows share; those have a row for each program."""
    batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    program = batch * tl.num_programs(1) + part
    channel = tl.arange(0, BLOCK)
    inside = channel < hidden
    sum_gate = tl.zeros([BLOCK], tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    sum_scale = tl.zeros([BLOCK], tl.float32)
    sum_shift = tl.zeros([BLOCK], tl.float32)
    first = part * rows_of_program
    for token in range(first, tl.minimum(first + rows_of_program, tokens)):
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
            sum_scale += grad * before
            sum_shift += grad
            place = batch * scale_row + token * scale_token
            grad *= 1.0 + tl.load(scale + place + channel, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            sum_bias += grad
        if HAS_WEIGHT:
            sum_weight += grad * unit
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
            added = tl.load(update + row * hidden + channel, mask=inside, other=0.0).to(tl.float32)
            sum_gate += grad * added
            place = batch * gate_row + token * gate_token
            grad *= tl.load(gate + place + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_update + row * hidden + channel, grad.to(d_update.dtype.element_ty), mask=inside)
    if HAS_GATE:
        tl.store(d_gate + program * hidden + channel, sum_gate, mask=inside)
    if HAS_WEIGHT:
        tl.store(d_weight + program * hidden + channel, sum_weight, mask=inside)
    if HAS_BIAS:
        tl.store(d_bias + program * hidden + channel, sum_bias, mask=inside)
    if HAS_MODULATION:
        tl.store(d_scale + program * hidden + channel, sum_scale, mask=inside)
        tl.store(d_shift + program * hidden + channel, sum_shift, mask=inside)


def num_warps(block: int, values: int = 8) -> int:
    """So many that each thread holds this many values of a row; the backward pass has ten rows at once."""
    return min(max(block // (32 * values), 1), 32)


def _strides(modulation: torch.Tensor | None) -> tuple[int, int]:
    """Of rows and tokens of (batch, 1 or tokens, hidden); 0 where all tokens share one."""
    if modulation is None:
        return 0, 0
    return modulation.stride(0), 0 if modulation.shape[1] == 1 else modulation.stride(1)


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
        num_warps=warps(num_warps(block)), **OPTIONS,
    )  # fmt: skip


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
    rows = 1 if per_token else ROWS
    parts = triton.cdiv(tokens, rows)
    wanted = (gate, weight, bias, scale, scale)
    # A tensor without elements stands for one that is not there, since an operation returns no None.
    sums = tuple(
        residual.new_empty(batch, parts, hidden if one is not None else 0, dtype=torch.float32)
        for one in wanted
    )
    if residual.numel() == 0:
        return sums
    block = triton.next_power_of_2(hidden)
    backward_kernel[(batch, parts)](
        d_normed, d_residual, residual, update, gate, weight, bias, scale, mean, rstd,
        dx, d_update, *sums, tokens, hidden, rows, *_strides(gate), *_strides(scale),
        RMS=rms, HAS_RESIDUAL=d_residual is not None, HAS_GATE=gate is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, HAS_MODULATION=scale is not None, BLOCK=block,
        num_warps=warps(num_warps(block, 4)), **OPTIONS,
    )  # fmt: skip
    return sums


def variants() -> list[Variant]:
    """VAR (layer norm, modulation, gate), RAR (with weights, too), LlamaGen (RMS norm behind a sum), at three widths."""
    forms = {
        "VAR-d16": (1024, False, True, False, True),
        "RAR-XL": (1280, False, True, True, True),
        "LlamaGen-XXL": (1536, True, False, True, False),
        "widest": (MAX_HIDDEN, False, True, True, True),
    }
    return [variant for label, form in forms.items() for variant in _variants(label, *form)]


def _variants(
    label: str, hidden: int, rms: bool, has_modulation: bool, has_weight: bool, has_gate: bool
) -> list[Variant]:
    block = triton.next_power_of_2(hidden)
    value, total = "*bf16", "*fp32"
    shared = {
        "RMS": rms, "HAS_GATE": has_gate, "HAS_WEIGHT": has_weight, "HAS_BIAS": has_weight and not rms,
        "HAS_MODULATION": has_modulation, "BLOCK": block,
    }  # fmt: skip
    integers = dict.fromkeys(
        ["tokens", "hidden", "gate_row", "gate_token", "scale_row", "scale_token"], "i32"
    )
    ahead = {
        **dict.fromkeys(["x", "update", "gate", "weight", "bias", "scale", "shift", "normed", "residual"], value),
        **dict.fromkeys(["mean", "rstd"], total), **integers, "shift_row": "i32", "shift_token": "i32", "eps": "fp32",
    }  # fmt: skip
    back = {
        **dict.fromkeys(["d_normed", "d_residual", "residual", "update", "gate", "weight", "bias", "scale", "dx", "d_update"], value),
        **dict.fromkeys(["mean", "rstd", "d_gate", "d_weight", "d_bias", "d_scale", "d_shift"], total),
        **integers, "rows_of_program": "i32",
    }  # fmt: skip
    return [
        Variant(f"{label}, forward", forward_kernel, ahead, {**shared, "HAS_UPDATE": True}, num_warps(block)),
        Variant(
            f"{label}, backward", backward_kernel, back, {**shared, "HAS_RESIDUAL": True}, num_warps(block, 4)
        ),
    ]
