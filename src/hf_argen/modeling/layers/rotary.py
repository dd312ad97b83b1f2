"""Rotary position embeddings (arXiv 2104.09864)."""

import torch

from ...kernels.qk_norm_rope import Rotation


def rotary_2d(positions: torch.Tensor, head_dim: int, width: int, base: float, prefix: int) -> Rotation:
    """
    The rotation of tokens of a grid: the first half of the pairs of adjacent channels turns with the row, the second with
    the column.

    Args:
        positions: (rows, n) int64, counted from the first token of a prefix of `prefix` tokens before the grid.
        head_dim: width of a head, a multiple of 4.
        width: tokens per row of the grid.
        base: of the frequencies.

    Returns:
        of all tokens, (rows, 1, n, head_dim / 2, ...) float32; zeros for the prefix, whose queries and keys vanish
        (LlamaGen).
    """
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2, device=positions.device).float() / half)
    place = (positions - prefix).unsqueeze(-1)
    in_grid = place >= 0
    place = place.clamp(min=0)
    angles = torch.cat([(place // width) * frequencies, (place % width) * frequencies], dim=-1)
    return Rotation.of(angles.cos() * in_grid, angles.sin() * in_grid)
