"""Rotary position embeddings (arXiv 2104.09864)."""

import torch


def rotary_2d(
    positions: torch.Tensor, head_dim: int, width: int, base: float, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The rotation of tokens of a grid, for [`rotate_pairs`]: the first half of the pairs of channels turns with the row, the
    second with the column.

    Args:
        positions: (rows, n) int64, counted from the first token of a prefix of `prefix` tokens before the grid.
        head_dim: width of a head, a multiple of 4.
        width: tokens per row of the grid.
        base: of the frequencies.

    Returns:
        factors (rows, 1, n, head_dim / 2, 1) of a pair of channels and (rows, 1, n, head_dim / 2, 2) of the pair
        turned round, float32; zeros for the prefix, whose queries and keys vanish (LlamaGen).
    """
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2, device=positions.device).float() / half)
    place = (positions - prefix).unsqueeze(-1)
    in_grid = place >= 0
    place = place.clamp(min=0)
    angles = torch.cat([(place // width) * frequencies, (place % width) * frequencies], dim=-1)
    cos, sin = ((part * in_grid).unsqueeze(1) for part in (angles.cos(), angles.sin()))
    return cos.unsqueeze(-1), torch.stack([-sin, sin], dim=-1)


def rotate_pairs(states: torch.Tensor, kept: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """Turns the pairs of adjacent channels of (..., rows, heads, n, head_dim), in float32."""
    pairs = states.float().view(*states.shape[:-1], -1, 2)
    # (even, odd) * cos + (odd, even) * (-sin, sin)
    return torch.addcmul(pairs * kept, pairs.flip(-1), turned).flatten(-2).to(states.dtype)
