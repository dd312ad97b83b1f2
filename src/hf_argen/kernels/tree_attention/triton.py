"""
Attention of nodes to a cache and to their ancestors.

The nodes of all heads that share keys are the rows of one matrix product, and the keys are split among programs, as many
as keep a GPU busy at a batch of one; a second kernel puts their parts together.
"""

import torch
import triton
import triton.language as tl

from ..dispatch import INTERPRETS
from ..library import on_its_device
from ..variants import OPTIONS, Variant, stages

FEWEST_KEYS = 256  # for one program
PROGRAMS = 256  # that keep a GPU busy
MOST_PARTS = 64


@triton.jit
def partial_kernel(
    query, keys, values, starts, ancestors, hidden, output, tops, sums,
    n, groups, key_heads, nodes, capacity, columns_of_program, words, hidden_words, scaling,
    query_row, query_head, query_node, keys_row, keys_head, keys_column, values_row, values_head, values_column,
    ancestors_row,
    HAS_HIDDEN: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """
    Rows are (group, node) of one head of keys. Written are weighted means, the largest score, and the sum of weights; with
    WHOLE there is one part, which is the result.
    """
    pair = tl.program_id(0)
    batch, key_head = (pair // key_heads).to(tl.int64), pair % key_heads
    part = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    exists = row < groups * n
    group, node = row // n, row % n
    head = key_head * groups + group
    channel = tl.arange(0, CHANNELS)
    in_head = channel < HEAD_DIM
    place = batch * query_row + head.to(tl.int64) * query_head + node * query_node
    states = tl.load(
        query + place[:, None] + channel[None, :], mask=exists[:, None] & in_head[None, :], other=0.0
    )
    if UPCAST:
        states = states.to(tl.float32)
    start = tl.load(starts + batch).to(tl.int32)
    end = tl.minimum(start + nodes, capacity)
    keys += batch * keys_row + key_head.to(tl.int64) * keys_head
    values += batch * values_row + key_head.to(tl.int64) * values_head
    ancestors += batch * ancestors_row
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    first = part * columns_of_program
    for begin in range(first, tl.minimum(first + columns_of_program, end), COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        in_cache = column < end
        entry = column - start
        is_node = entry >= 0
        if HAS_HIDDEN:
            in_words = in_cache & (is_node == 0) & (column < hidden_words * 32)
            word = tl.load(hidden + batch * hidden_words + column // 32, mask=in_words, other=0)
            in_cache = in_cache & (((word >> (column % 32)) & 1) == 0)
        seen = in_cache[None, :] & exists[:, None]
        if begin + COLUMNS > start:
            of_node = node[:, None] * words + tl.maximum(entry, 0)[None, :] // 32
            bits = tl.load(ancestors + of_node, mask=seen & is_node[None, :], other=-1)
            seen = seen & (((bits >> (tl.maximum(entry, 0) % 32)[None, :]) & 1) == 1)
        inside = in_cache[:, None] & in_head[None, :]
        offset = column.to(tl.int64)[:, None]
        key = tl.load(keys + offset * keys_column + channel[None, :], mask=inside, other=0.0)
        value = tl.load(values + offset * values_column + channel[None, :], mask=inside, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(states, tl.trans(key), input_precision="ieee") * scaling
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # where nothing is seen yet
        weights = tl.exp(scores - base[:, None])
        fading = tl.exp(top - base)
        total = total * fading + tl.sum(weights, axis=1)
        mean = mean * fading[:, None]
        mean = tl.dot(weights.to(value.dtype), value, acc=mean, input_precision="ieee")
        top = higher
    mean = mean / tl.where(total > 0.0, total, 1.0)[:, None]
    place = ((batch * key_heads + key_head) * groups + group) * n + node
    if not WHOLE:
        place = place * tl.num_programs(2) + part
        tl.store(tops + place, top, mask=exists)
        tl.store(sums + place, total, mask=exists)
    place = place[:, None] * HEAD_DIM + channel[None, :]
    tl.store(output + place, mean.to(output.dtype.element_ty), mask=exists[:, None] & in_head[None, :])


@triton.jit
def joining_kernel(
    partial, tops, sums, output, parts,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The parts of one row by their weights."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, CHANNELS)
    exists, in_head = part < parts, channel < HEAD_DIM
    top = tl.load(tops + row * parts + part, mask=exists, other=float("-inf"))
    highest = tl.max(top, axis=0)
    weight = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    weight *= tl.load(sums + row * parts + part, mask=exists, other=0.0)
    total = tl.sum(weight, axis=0)
    place = (row * parts + part)[:, None] * HEAD_DIM + channel[None, :]
    means = tl.load(partial + place, mask=exists[:, None] & in_head[None, :], other=0.0)
    result = tl.sum(means * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(output + row * HEAD_DIM + channel, result.to(output.dtype.element_ty), mask=in_head)


def tiles(rows: int, head_dim: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, columns and channels of a step: as much as registers hold on all chips, with one step ahead."""
    channels = max(triton.next_power_of_2(head_dim), 32)
    is_small = itemsize == 2 and channels <= 128
    fewest, most = (32 if itemsize == 4 and channels > 128 else 16), (64 if is_small else 32)
    return min(max(triton.next_power_of_2(rows), fewest), most), 32 if is_small else 16, channels


def num_warps(rows: int, channels: int, itemsize: int) -> int:
    """So many that keys, values and sums of a step fit into registers, on all chips."""
    return 4 if rows == 16 and channels <= (128 if itemsize == 4 else 32) else 8


def parts_of(programs: int, capacity: int) -> int:
    """Among how many programs the keys are split."""
    return max(min(triton.cdiv(PROGRAMS, programs), triton.cdiv(capacity, FEWEST_KEYS), MOST_PARTS), 1)


@on_its_device
def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    ancestors: torch.Tensor,
    nodes: int,
    hidden: torch.Tensor | None,
    scaling: float,
    columns: int,
    output: torch.Tensor,
) -> None:
    """Fills `output` (batch, heads, n, head_dim), contiguous; `columns` bounds the places in use."""
    batch, heads, n, head_dim = query.shape
    if query.numel() == 0:
        return
    key_heads = keys.shape[1]
    groups = heads // key_heads
    rows, step, channels = tiles(groups * n, head_dim, keys.element_size())
    blocks = triton.cdiv(groups * n, rows)
    parts = parts_of(batch * key_heads * blocks, columns)
    of_program = triton.cdiv(triton.cdiv(columns, parts), step) * step
    parts = triton.cdiv(columns, of_program)
    partial, tops, sums = output, None, None
    if parts > 1:
        partial = query.new_empty(batch * heads * n, parts, head_dim, dtype=torch.float32)
        tops, sums = query.new_empty(2, batch * heads * n, parts, dtype=torch.float32)
    partial_kernel[(batch * key_heads, blocks, parts)](
        query, keys, values, starts, ancestors, hidden, partial, tops, sums,
        n, groups, key_heads, nodes, keys.shape[2], of_program, ancestors.shape[2],
        0 if hidden is None else hidden.shape[1], scaling,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        0 if ancestors.shape[0] == 1 else ancestors.stride(0),
        HAS_HIDDEN=hidden is not None, WHOLE=parts == 1, UPCAST=INTERPRETS, HEAD_DIM=head_dim, CHANNELS=channels,
        ROWS=rows, COLUMNS=step, num_warps=num_warps(rows, channels, keys.element_size()), num_stages=stages(2), **OPTIONS,
    )  # fmt: skip
    if parts > 1:
        joining_kernel[(batch * heads * n,)](
            partial, tops, sums, output, parts, HEAD_DIM=head_dim, CHANNELS=channels,
            PARTS=triton.next_power_of_2(parts), num_warps=4, **OPTIONS,
        )  # fmt: skip


def variants() -> list[Variant]:
    """One token, trees and a scale of released models, and the largest tiles, in float32, too."""
    forms = {
        "LlamaGen-XXL, 1 token": (1, 64, "*bf16", False, False),
        "VAR-d30, 16x16 tokens": (256, 64, "*bf16", True, False),
        "8B model, 1 token": (4, 128, "*bf16", False, True),
        "8B model, tree of 64 nodes": (256, 128, "*bf16", False, True),
        "256 channels, tree": (64, 256, "*bf16", False, True),
        "64 channels, float32": (64, 64, "*fp32", False, True),
        "256 channels, float32": (64, 256, "*fp32", False, True),
    }
    variants = [_variant(label, *form) for label, form in forms.items()]
    types = {"partial": "*fp32", "tops": "*fp32", "sums": "*fp32", "output": "*bf16", "parts": "i32"}
    constants = {"HEAD_DIM": 128, "CHANNELS": 128, "PARTS": MOST_PARTS}
    return [*variants, Variant("parts put together", joining_kernel, types, constants, num_warps=4)]


def _variant(label: str, rows: int, head_dim: int, value: str, whole: bool, has_hidden: bool) -> Variant:
    itemsize = 4 if value == "*fp32" else 2
    rows, columns, channels = tiles(rows, head_dim, itemsize)
    integers = [
        "n", "groups", "key_heads", "nodes", "capacity", "columns_of_program", "words", "hidden_words",
        *(f"{name}_{dim}" for name, last in (("query", "node"), ("keys", "column"), ("values", "column"))
          for dim in ("row", "head", last)),
        "ancestors_row",
    ]  # fmt: skip
    types = {
        **dict.fromkeys(["query", "keys", "values"], value), "starts": "*i64", "ancestors": "*i32", "hidden": "*i32",
        "output": value if whole else "*fp32", "tops": "*fp32", "sums": "*fp32", "scaling": "fp32",
        **dict.fromkeys(integers, "i32"),
    }  # fmt: skip
    constants = {
        "HAS_HIDDEN": has_hidden, "WHOLE": whole, "UPCAST": False, "HEAD_DIM": head_dim, "CHANNELS": channels,
        "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    return Variant(label, partial_kernel, types, constants, num_warps(rows, channels, itemsize), num_stages=2)
