"""Norm of queries and keys, rotary embedding and the write into the cache: every head of a token is read and written once."""

import torch
import triton
import triton.language as tl

from ..library import on_its_device
from ..variants import OPTIONS, Variant

NORMS = {None: 0, "l2": 1, "rms": 2, "layer": 3}
BLOCK = 1024  # channels of one program


@triton.jit
def _loaded(states, heads, first, second, head_stride, inside):
    place = heads[:, None] * head_stride
    one = tl.load(states + place + first[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(states + place + second[None, :], mask=inside, other=0.0).to(tl.float32)
    return one, other


@triton.jit
def _stored(states, one, other, heads, first, second, head_stride, inside):
    place = heads[:, None] * head_stride
    tl.store(states + place + first[None, :], one.to(states.dtype.element_ty), mask=inside)
    tl.store(states + place + second[None, :], other.to(states.dtype.element_ty), mask=inside)


@triton.jit
def _prepared(
    one, other, weight, bias, cos, sin, first, second, in_half, inside, eps, HALF: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROTATES: tl.constexpr,
):  # fmt: skip
    """Two channels of every pair, (heads, pairs) each, after norm and rotation."""
    if NORM == 3:
        mean = (tl.sum(one, axis=1) + tl.sum(other, axis=1)) / (2 * HALF)
        one = tl.where(inside, one - mean[:, None], 0.0)
        other = tl.where(inside, other - mean[:, None], 0.0)
    if NORM != 0:
        square = tl.sum(one * one, axis=1) + tl.sum(other * other, axis=1)
        if NORM == 1:
            factor = 1.0 / tl.maximum(tl.sqrt(square), eps)
        else:
            factor = 1.0 / tl.sqrt(square / (2 * HALF) + eps)
        one *= factor[:, None]
        other *= factor[:, None]
    if HAS_WEIGHT:
        one *= tl.load(weight + first, mask=in_half, other=0.0).to(tl.float32)[None, :]
        other *= tl.load(weight + second, mask=in_half, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        one += tl.load(bias + first, mask=in_half, other=0.0).to(tl.float32)[None, :]
        other += tl.load(bias + second, mask=in_half, other=0.0).to(tl.float32)[None, :]
    if ROTATES:
        turned = one * cos[None, :] - other * sin[None, :]
        other = other * cos[None, :] + one * sin[None, :]
        one = turned
    return one, other


@triton.jit
def qk_kernel(
    query, key, value, query_out, key_out, value_out,
    query_weight, key_weight, query_bias, key_bias, query_scale, cos, sin, places,
    n, heads, key_heads, start, capacity, eps,
    query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token,
    query_out_row, query_out_head, query_out_token, key_out_row, key_out_head, key_out_token,
    value_out_row, value_out_head, value_out_token,
    cos_row, cos_token, cos_pair, sin_row, sin_token, sin_pair,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    ROTATES: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_VALUE: tl.constexpr, HAS_PLACES: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token and a few of its heads; programs after those of the queries do keys and values."""
    index = tl.program_id(0).to(tl.int64)
    row, token = index // n, index % n
    pair = tl.arange(0, HALF_BLOCK)
    in_half = pair < HALF
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    else:
        first = pair
        second = pair + HALF
    if ROTATES:
        cosine = tl.load(cos + row * cos_row + token * cos_token + pair * cos_pair, mask=in_half, other=0.0)
        sine = tl.load(sin + row * sin_row + token * sin_token + pair * sin_pair, mask=in_half, other=0.0)
    else:
        cosine = 1.0
        sine = 0.0
    block = tl.program_id(1)
    query_blocks = tl.cdiv(heads, HEADS)
    if block < query_blocks:
        head = (block * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        inside = (head < heads)[:, None] & in_half[None, :]
        states = query + row * query_row + token * query_token
        one, other = _loaded(states, head, first, second, query_head, inside)
        one, other = _prepared(
            one, other, query_weight, query_bias, cosine, sine, first, second, in_half, inside, eps, HALF,
            NORM, HAS_WEIGHT, HAS_BIAS, ROTATES,
        )  # fmt: skip
        if HAS_SCALE:
            factor = tl.load(query_scale + head, mask=head < heads, other=0.0).to(tl.float32)
            one *= factor[:, None]
            other *= factor[:, None]
        states = query_out + row * query_out_row + token * query_out_token
        _stored(states, one, other, head, first, second, query_out_head, inside)
    else:
        head = ((block - query_blocks) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
        inside = (head < key_heads)[:, None] & in_half[None, :]
        place = start + token
        if HAS_PLACES:
            place = tl.load(places + index)
        heads_here = tl.where((place >= 0) & (place < capacity), key_heads, 0)
        in_cache = (head < heads_here)[:, None] & in_half[None, :]
        states = key + row * key_row + token * key_token
        one, other = _loaded(states, head, first, second, key_head, inside)
        one, other = _prepared(
            one, other, key_weight, key_bias, cosine, sine, first, second, in_half, inside, eps, HALF,
            NORM, HAS_WEIGHT, HAS_BIAS, ROTATES,
        )  # fmt: skip
        states = key_out + row * key_out_row + place * key_out_token
        _stored(states, one, other, head, first, second, key_out_head, in_cache)
        if HAS_VALUE:
            states = value + row * value_row + token * value_token
            one, other = _loaded(states, head, first, second, value_head, inside)
            states = value_out + row * value_out_row + place * value_out_token
            _stored(states, one, other, head, first, second, value_out_head, in_cache)


def heads_of_program(head_dim: int) -> int:
    """As many as make up a block, a power of two."""
    return max(BLOCK // triton.next_power_of_2(head_dim), 1)


@on_its_device
def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    norm: str | None,
    eps: float,
    weights: tuple[torch.Tensor | None, ...],
    query_scale: torch.Tensor | None,
    tables: tuple[torch.Tensor | None, torch.Tensor | None],
    interleaved: bool,
    places: torch.Tensor | None,
    start: int,
) -> None:
    """
    Fills `outputs`: queries, keys and values, of which the latter two may be a cache.

    Args:
        weights: of queries and keys, then the biases of queries and keys.
        tables: cos and sin (rows or 1, n, pairs).
    """
    batch, heads, n, head_dim = query.shape
    if query.numel() == 0:
        return
    key_heads, block = key.shape[1], heads_of_program(head_dim)

    def strides(states: torch.Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if states is None else states.stride()[:3]

    def of_table(table: torch.Tensor | None) -> tuple[int, int, int]:
        return (
            (0, 0, 0)
            if table is None
            else (0 if table.shape[0] == 1 else table.stride(0), *table.stride()[1:])
        )

    grid = (batch * n, triton.cdiv(heads, block) + triton.cdiv(key_heads, block))
    qk_kernel[grid](
        query, key, value, *outputs, *weights, query_scale, *tables, places,
        n, heads, key_heads, start, outputs[1].shape[2], eps,
        *strides(query), *strides(key), *strides(value), *(stride for one in outputs for stride in strides(one)),
        *of_table(tables[0]), *of_table(tables[1]),
        NORM=NORMS[norm], HAS_WEIGHT=weights[0] is not None, HAS_BIAS=weights[2] is not None,
        HAS_SCALE=query_scale is not None, ROTATES=tables[0] is not None, INTERLEAVED=interleaved,
        HAS_VALUE=value is not None, HAS_PLACES=places is not None,
        HALF=head_dim // 2, HALF_BLOCK=triton.next_power_of_2(head_dim // 2), HEADS=block,
        num_warps=4, **OPTIONS,
    )  # fmt: skip


def variants() -> list[Variant]:
    """VAR (cosines), LlamaGen (rotation of adjacent channels), RAR (layer norm), Qwen3 (RMS norm, rotation of halves)."""
    forms = {
        "VAR, L2": (1, False, True, False, True, 64),
        "RAR, layer norm": (3, True, False, False, True, 80),
        "LlamaGen, rotation": (0, False, False, True, True, 64),
        "Qwen3, RMS and rotation": (2, True, False, True, False, 128),
    }
    states = ["query", "key", "value", "query_out", "key_out", "value_out"]
    pointers = [*states, "query_weight", "key_weight", "query_bias", "key_bias", "query_scale"]
    strides = [f"{name}_{dim}" for name in states for dim in ("row", "head", "token")]
    strides += [f"{name}_{dim}" for name in ("cos", "sin") for dim in ("row", "token", "pair")]
    types = {
        **dict.fromkeys(pointers, "*bf16"), "cos": "*fp32", "sin": "*fp32", "places": "*i64", "eps": "fp32",
        **dict.fromkeys(["n", "heads", "key_heads", "start", "capacity", *strides], "i32"),
    }  # fmt: skip
    return [
        Variant(
            label, qk_kernel, types,
            {
                "NORM": norm, "HAS_WEIGHT": has_weight, "HAS_BIAS": norm == 3, "HAS_SCALE": has_scale,
                "ROTATES": rotates, "INTERLEAVED": interleaved, "HAS_VALUE": True, "HAS_PLACES": True,
                "HALF": head_dim // 2, "HALF_BLOCK": triton.next_power_of_2(head_dim // 2),
                "HEADS": heads_of_program(head_dim),
            },
            num_warps=4,
            unaligned=frozenset({"sin"}),  # a view on every second value
        )
        for label, (norm, has_weight, has_scale, rotates, interleaved, head_dim) in forms.items()
    ]  # fmt: skip
