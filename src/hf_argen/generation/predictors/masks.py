"""Additive attention masks over a cache whose rows end in different places and whose last positions form a tree."""

from dataclasses import dataclass

import numpy as np
import torch

from ...kernels.tree_attention import pack
from ..cache import TreeView


@dataclass(frozen=True)
class Pattern:
    """
    What a layer sees of the past.

    Args:
        window: positions, its own included; `None` for all.
        chunk: length of the blocks of positions within which it stays; `None` for no blocks.
    """

    window: int | None = None
    chunk: int | None = None


@dataclass
class View:
    """
    The positions of a cache as the last `n` nodes of every row see them.

    Attributes:
        starts: (batch,) int64, the column at which a row's committed positions end and its nodes begin.
        columns: columns of the mask.
        ancestors: (batch or 1, n, nodes) bool, see [`NodeTree`].
        hidden: (rows, prompt) bool, padding of the prompt, or `None`; rows is batch or, with guidance, twice that.
    """

    starts: torch.Tensor
    columns: int
    ancestors: torch.Tensor
    hidden: torch.Tensor | None = None

    def visible(self, pattern: Pattern, rows: int) -> torch.Tensor:
        """(rows, n, columns) bool."""
        batch, nodes = len(self.starts), self.ancestors.shape[-1]
        column = torch.arange(self.columns, device=self.starts.device)
        node = column[None] - self.starts[:, None]  # which node lies in a column; negative: committed
        ancestors = self.ancestors.expand(batch, -1, -1)
        index = node.clamp(0, nodes - 1)[:, None].expand(-1, ancestors.shape[1], -1)
        is_node = (node >= 0) & (node < nodes)
        seen = (node < 0)[:, None] | (ancestors.gather(2, index) & is_node[:, None])
        seen = seen.repeat(rows // batch, 1, 1)
        if self.hidden is not None:
            prompt = self.hidden.shape[1]
            seen[:, :, :prompt] &= ~self.hidden[:, None]
        if pattern.window is not None or pattern.chunk is not None:
            seen &= self._near(pattern, column, node, index, rows)
        return seen

    def packed(self, rows: int) -> TreeView:
        """The same without patterns, for `kernels.tree_attention`."""
        copies = rows // len(self.starts)
        ancestors = self.ancestors if len(self.ancestors) == 1 else self.ancestors.repeat(copies, 1, 1)
        hidden = None if self.hidden is None else pack(self.hidden)
        return TreeView(self.starts.repeat(copies), pack(ancestors), ancestors.shape[-1], hidden)

    def _near(
        self, pattern: Pattern, column: torch.Tensor, node: torch.Tensor, index: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """(rows, n, columns) bool: what the pattern lets through, by the positions of query and key."""
        batch = len(self.starts)
        depth = self.ancestors.expand(batch, -1, -1).sum(dim=-1) - 1
        query = self.starts[:, None] + depth
        # A node stands where it would stand in a chain. Depths of all nodes are those of the last n and of the
        # earlier ones; on a path, the ancestors that are seen have the depths 0, 1, 2, ... in order of their number.
        order = (self.ancestors.expand(batch, -1, -1).cumsum(dim=-1) - 1).gather(2, index)
        key = torch.where((node < 0)[:, None], column[None, None], self.starts[:, None, None] + order)
        query, key = (part.repeat(rows // batch, 1, 1) for part in (query.unsqueeze(-1), key))
        near = torch.ones_like(key, dtype=torch.bool)
        if pattern.window is not None:
            near &= key > query - pattern.window
        if pattern.chunk is not None:
            padding = 0 if self.hidden is None else self.hidden.sum(dim=1)[:, None, None]
            near &= (key - padding) // pattern.chunk == (query - padding) // pattern.chunk
        return near


def additive_of_nodes(committed: int, ancestors: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """
    `additive` of what [`View`] sees where all rows end at the column `committed`, nothing of the prompt is hidden, no
    pattern bounds the sight, and the nodes are the last columns; in a few operations.
    """
    batch, n, nodes = ancestors.shape
    mask = torch.zeros(rows, 1, n, committed + nodes, dtype=dtype, device=ancestors.device)
    hidden = ~ancestors if batch == 1 else (~ancestors).repeat(rows // batch, 1, 1)
    mask[..., committed:].masked_fill_(hidden.unsqueeze(1), torch.finfo(dtype).min)
    return mask


def additive_on_host(
    starts: list[int],
    columns: int,
    ancestors: torch.Tensor,
    hidden: torch.Tensor | None,
    rows: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`additive` of what [`View`] sees without a pattern, written down row by row on a CPU, where that takes less time."""
    n, nodes = ancestors.shape[1:]
    lowest = torch.finfo(dtype).min
    mask = np.zeros((rows, 1, n, columns), dtype=np.float64 if dtype == torch.float64 else np.float32)
    of_nodes = np.where(ancestors.numpy(), 0.0, lowest)
    if hidden is not None:
        prompt = hidden.shape[1]
        np.copyto(mask[..., :prompt], lowest, where=hidden.numpy()[:, None, None])
    for row in range(rows):
        start = starts[row % len(starts)]
        mask[row, 0, :, start : start + nodes] = of_nodes[row % len(of_nodes)]
        mask[row, 0, :, start + nodes :] = lowest
    return torch.from_numpy(mask).to(dtype)


def additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, n, columns) bool to (rows, 1, n, columns): 0 where visible, the lowest number elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
