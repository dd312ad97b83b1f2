"""Squares of a grid as one token each."""

import torch


def patchify(cells: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """
    Cells (batch, h * w, channels) of a grid, row by row, to patches (batch, patches, channels * side ** 2), whose numbers are
    ordered by channel, row and column.

    Args:
        grid: (height, width) in patches.
        side: cells per side of a patch.
    """
    if side == 1:
        return cells
    height, width = grid
    split = cells.view(len(cells), height, side, width, side, -1)
    return split.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """The inverse of `patchify`."""
    if side == 1:
        return patches
    height, width = grid
    split = patches.view(len(patches), height, width, -1, side, side)
    return split.permute(0, 1, 4, 2, 5, 3).flatten(1, 4)
