"""Rotary position embeddings (arXiv 2104.09864)."""

import torch


def rotary_2d(
    positions: torch.Tensor, head_dim: int, width: int, base: float, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosine and sine of the rotation of tokens of a grid: the first half of the pairs of channels turns with the row, the
    second with the column.

    Args:
        positions: (rows, n) int64, counted from the first token of a prefix of `prefix` tokens before the grid.
        head_dim: width of a head, a multiple of 4.
        width: tokens per row of the grid.
        base: of the frequencies.

    Returns:
        two of (rows, 1, n, head_dim / 2) float32; zeros for the prefix, whose queries and keys vanish (LlamaGen).
    """
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2, device=positions.device).float() / half)
    place = (positions - prefix).unsqueeze(-1)
    in_grid = place >= 0
    place = place.clamp(min=0)
    angles = torch.cat([(place // width) * frequencies, (place % width) * frequencies], dim=-1)
    return tuple((part * in_grid).unsqueeze(1) for part in (angles.cos(), angles.sin()))


def rotate_pairs(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs of adjacent channels of (rows, heads, n, head_dim), in float32."""
    even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(states.dtype)
