"""Nearest codes without the matrix of distances: a program keeps the best code of its vectors while it reads the codes."""

import torch
import triton
import triton.language as tl

from ..library import on_its_device
from ..variants import OPTIONS, Variant, stages

# Of one step; products in float32, which leave few registers.
VECTORS, CODES, CHANNELS, NUM_WARPS = 32, 32, 16, 4
FEWEST_PROGRAMS = 128  # below that the codes are split among programs
ROWS = 32  # of sign codes, for one program


@triton.jit
def nearest_kernel(
    vectors, codes, distances, ids,
    count, num_codes, channels, codes_of_program,
    height, width, rows, columns, vector_row, vector_channel, vector_y, vector_x, code_row,
    COSINE: tl.constexpr, POOLED: tl.constexpr, WINDOW: tl.constexpr,
    VECTORS: tl.constexpr, CODES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """
    The best of a part of the codes for a few vectors. With POOLED a vector is the mean over a window of a map (height,
    width), one of a grid (rows, columns) of them, as area interpolation has it.
    """
    vector = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)
    exists = vector < count
    part = tl.program_id(1)
    if POOLED:
        cell = vector % (rows * columns)
        image = (vector // (rows * columns)).to(tl.int64)
        top = (cell // columns) * height // rows
        bottom = ((cell // columns + 1) * height + rows - 1) // rows
        left = (cell % columns) * width // columns
        right = ((cell % columns + 1) * width + columns - 1) // columns
        area = ((bottom - top) * (right - left)).to(tl.float32)
    best = tl.full([VECTORS], float("inf"), tl.float32)
    chosen = tl.zeros([VECTORS], tl.int32)
    first = part * codes_of_program
    for start in range(first, tl.minimum(first + codes_of_program, num_codes), CODES):
        code = start + tl.arange(0, CODES)
        in_codes = code < num_codes
        product = tl.zeros([VECTORS, CODES], tl.float32)
        square = tl.zeros([CODES], tl.float32)
        for offset in range(0, channels, CHANNELS):
            channel = offset + tl.arange(0, CHANNELS)
            in_channels = channel < channels
            if POOLED:
                tile = tl.zeros([VECTORS, CHANNELS], tl.float32)
                for step in range(WINDOW * WINDOW):
                    y = top + step // WINDOW
                    x = left + step % WINDOW
                    in_window = exists & (y < bottom) & (x < right)
                    place = image * vector_row + y * vector_y + x * vector_x
                    tile += tl.load(
                        vectors + place[:, None] + channel[None, :] * vector_channel,
                        mask=in_window[:, None] & in_channels[None, :], other=0.0,
                    ).to(tl.float32)  # fmt: skip
                if WINDOW > 1:
                    tile = tile / tl.where(exists, area, 1.0)[:, None]
            else:
                place = vector.to(tl.int64)[:, None] * vector_row + channel[None, :] * vector_channel
                inside = exists[:, None] & in_channels[None, :]
                tile = tl.load(vectors + place, mask=inside, other=0.0).to(tl.float32)
            place = code.to(tl.int64)[:, None] * code_row + channel[None, :]
            inside = in_codes[:, None] & in_channels[None, :]
            entries = tl.load(codes + place, mask=inside, other=0.0).to(tl.float32)
            product = tl.dot(tile, tl.trans(entries), acc=product, input_precision="ieee")
            square += tl.sum(entries * entries, axis=1)
        if COSINE:
            distance = -product / tl.maximum(tl.sqrt(square), 1e-12)[None, :]
        else:
            distance = (
                square[None, :] - 2.0 * product
            )  # but for the square of the vector, which all codes share
        distance = tl.where(in_codes[None, :], distance, float("inf"))
        nearest, place = tl.min(distance, axis=1, return_indices=True)
        chosen = tl.where(nearest < best, start + place, chosen)
        best = tl.minimum(best, nearest)
    output = vector.to(tl.int64) * tl.num_programs(1) + part
    tl.store(distances + output, best, mask=exists)
    tl.store(ids + output, chosen.to(tl.int64), mask=exists)


@triton.jit
def sign_kernel(
    latents, codes, ids, count, bits, scale, ROWS: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, BITS)
    inside = (row < count)[:, None] & (bit < bits)[None, :]
    place = row.to(tl.int64)[:, None] * bits + bit[None, :]
    value = tl.load(latents + place, mask=inside, other=0.0).to(tl.float32)
    is_set = value > 0.0
    tl.store(codes + place, tl.where(is_set, scale, -scale).to(codes.dtype.element_ty), mask=inside)
    worth = tl.full([BITS], 1, tl.int64) << tl.maximum(bits - 1 - bit, 0).to(tl.int64)
    tl.store(ids + row, tl.sum(tl.where(is_set & inside, worth[None, :], 0), axis=1), mask=row < count)


@on_its_device
def nearest(
    vectors: torch.Tensor, codes: torch.Tensor, metric: str, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Ids (n,) of vectors (n, channels); or, with `size`, of the cells of a map (batch, channels, height, width)."""
    if size is None:
        count, channels = vectors.shape
        height = width = rows = columns = window = 1
        strides = (vectors.stride(0), vectors.stride(1), 0, 0)
    else:
        batch, channels, height, width = vectors.shape
        rows, columns = size
        count = batch * rows * columns
        window = max(_window(height, rows), _window(width, columns))
        strides = vectors.stride()
    if count == 0:
        return vectors.new_empty((0,), dtype=torch.int64)
    blocks = triton.cdiv(count, VECTORS)
    parts = min(triton.cdiv(FEWEST_PROGRAMS, blocks), triton.cdiv(len(codes), CODES))
    of_program = triton.cdiv(triton.cdiv(len(codes), CODES), parts) * CODES
    parts = triton.cdiv(len(codes), of_program)
    distances = vectors.new_empty(count, parts, dtype=torch.float32)
    ids = vectors.new_empty(count, parts, dtype=torch.int64)
    nearest_kernel[(blocks, parts)](
        vectors, codes, distances, ids, count, len(codes), channels, of_program,
        height, width, rows, columns, *strides, codes.stride(0),
        COSINE=metric == "cosine", POOLED=size is not None, WINDOW=window,
        VECTORS=VECTORS, CODES=CODES, CHANNELS=CHANNELS, num_warps=NUM_WARPS, num_stages=stages(2), **OPTIONS,
    )  # fmt: skip
    if parts == 1:
        return ids[:, 0]
    return ids.gather(1, distances.argmin(dim=1, keepdim=True))[:, 0]


def _window(length: int, cells: int) -> int:
    """The most positions that a cell of area interpolation reaches over."""
    return max(-(-(cell + 1) * length // cells) - cell * length // cells for cell in range(cells))


@on_its_device
def signs(latents: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes like the latents (n, bits) and ids (n,)."""
    count, bits = latents.shape
    codes = latents.new_empty(latents.shape)
    ids = latents.new_empty((count,), dtype=torch.int64)
    if count:
        sign_kernel[(triton.cdiv(count, ROWS),)](
            latents, codes, ids, count, bits, scale,
            ROWS=ROWS, BITS=triton.next_power_of_2(bits), num_warps=4, **OPTIONS,
        )  # fmt: skip
    return codes, ids


def variants() -> list[Variant]:
    """A plain codebook, cosines, a scale of VAR from its map, and sign codes of 18 bits."""
    integers = [
        "count", "num_codes", "channels", "codes_of_program", "height", "width", "rows", "columns",
        "vector_row", "vector_channel", "vector_y", "vector_x", "code_row",
    ]  # fmt: skip
    types = {
        "vectors": "*fp32",
        "codes": "*fp32",
        "distances": "*fp32",
        "ids": "*i64",
        **dict.fromkeys(integers, "i32"),
    }
    tiles = {"VECTORS": VECTORS, "CODES": CODES, "CHANNELS": CHANNELS}
    forms = {
        "L2": {"COSINE": False, "POOLED": False, "WINDOW": 1},
        "cosine": {"COSINE": True, "POOLED": False, "WINDOW": 1},
        "L2, a scale of VAR": {"COSINE": False, "POOLED": True, "WINDOW": 4},
    }
    signs = {
        "latents": "*bf16",
        "codes": "*bf16",
        "ids": "*i64",
        "count": "i32",
        "bits": "i32",
        "scale": "fp32",
    }
    return [
        *(
            Variant(label, nearest_kernel, types, {**form, **tiles}, num_warps=NUM_WARPS, num_stages=2)
            for label, form in forms.items()
        ),
        Variant("signs of 18 bits", sign_kernel, signs, {"ROWS": ROWS, "BITS": 32}, num_warps=4),
    ]
