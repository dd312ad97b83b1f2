"""Tokens that were fed to a model but are not yet part of the sequence, and who of them sees whom."""

import numpy as np
import torch


class NodeTree:
    """
    The uncommitted nodes of every row, numbered from 0 in the order in which they were fed.

    A node continues its parent: an earlier node, or the committed sequence (-1). As long as every node continues the
    one before it, they are a chain and nothing is stored.
    """

    def __init__(self) -> None:
        self.size = 0
        self._parents: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None  # (batch, size, size) bool, once it is asked for
        self._walk: HostWalk | None = None  # on a CPU, in place of the tensors

    @property
    def is_chain(self) -> bool:
        """Whether each node continues the one before it."""
        return self._parents is None and self._walk is None

    def grow(self, n: int, parents: torch.Tensor | None, batch_size: int, device: torch.device) -> None:
        """Adds `n` nodes: `parents` (batch, n) int64 for each, or `None` to continue the last one in a chain."""
        if parents is None and self.is_chain:
            self.size += n
            return
        if device.type == "cpu":
            if self._walk is None:
                self._walk = HostWalk(batch_size)
                self._walk.grow([list(range(-1, self.size - 1))] * batch_size)
            if parents is None:
                self._walk.grow([list(range(self.size - 1, self.size + n - 1))] * batch_size)
            else:
                self._walk.grow(parents.tolist())
        else:
            if self._parents is None:
                self._parents = torch.arange(-1, self.size - 1, device=device).repeat(batch_size, 1)
            if parents is None:
                parents = torch.arange(self.size - 1, self.size + n - 1, device=device).repeat(batch_size, 1)
            self._parents = torch.cat([self._parents, parents.to(device)], dim=1)
            self._seen = None
        self.size += n

    def ancestors(self, n: int, device: torch.device) -> torch.Tensor:
        """(batch or 1, n, size) bool: which nodes the last `n` see, themselves included."""
        if self._walk is not None:
            return self._walk.seen(n)
        if self._parents is None:
            seen = torch.ones(self.size, self.size, dtype=torch.bool, device=device).tril()
            return seen[None, -n:]
        if self._seen is None:
            self._seen = closure(self._parents)
        return self._seen[:, -n:]

    def depths(self, n: int, device: torch.device) -> torch.Tensor:
        """(batch or 1, n) int64: how many nodes lie before each of the last `n` on its path."""
        if self._walk is not None:
            return torch.tensor([depths[-n:] for depths in self._walk.depths])
        if self._parents is None:
            return torch.arange(self.size - n, self.size, device=device)[None]
        return self.ancestors(n, device).sum(dim=-1) - 1

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows."""
        if self._walk is not None:
            self._walk.select_rows(rows.tolist())
        if self._parents is not None:
            self._parents, self._seen = self._parents.index_select(0, rows), None


class HostWalk:
    """
    Who sees whom, written down node by node. For the few nodes of a step that is less than the calls that it takes to find
    out for all of them together.

    Attributes:
        depths: of each row how many nodes lie before each node on its path.
    """

    def __init__(self, batch_size: int):
        self.depths: list[list[int]] = [[] for _ in range(batch_size)]
        # (batch, nodes + 1, nodes) with room for more; what continues the sequence alone sees the first line.
        self._table = np.zeros((batch_size, 1, 0), dtype=bool)

    def grow(self, parents: list[list[int]]) -> None:
        """Adds nodes, by the parents of those of each row."""
        before, size = len(self.depths[0]), len(self.depths[0]) + len(parents[0])
        if self._table.shape[2] < size:
            room = 2 * size
            table = np.zeros((len(parents), room + 1, room), dtype=bool)
            table[:, : before + 1, :before] = self._table[:, : before + 1, :before]
            self._table = table
        for table, depths, row in zip(self._table, self.depths, parents, strict=True):
            for node, parent in enumerate(row, start=before):
                table[node + 1] = table[parent + 1]
                table[node + 1, node] = True
                depths.append(0 if parent < 0 else depths[parent] + 1)

    def seen(self, n: int) -> torch.Tensor:
        """(batch, n, nodes) bool: which nodes the last `n` see, themselves included."""
        size = len(self.depths[0])
        return torch.from_numpy(self._table)[:, size + 1 - n : size + 1, :size]

    def select_rows(self, rows: list[int]) -> None:
        """Keeps, repeats or reorders rows."""
        self.depths = [list(self.depths[row]) for row in rows]
        self._table = self._table[rows]


def closure(parents: torch.Tensor) -> torch.Tensor:
    """(batch, n, n) bool: which nodes each node sees, itself included, from parents (batch, n) int64."""
    # Everyone sees himself and his parent; squaring doubles the generations that are seen.
    size = parents.shape[1]
    seen = torch.nn.functional.one_hot(parents + 1, size + 1)[..., 1:].float()
    seen = seen + torch.eye(size, device=parents.device)
    for _ in range((size - 1).bit_length()):
        seen = (seen @ seen).clamp(max=1)
    return seen > 0
