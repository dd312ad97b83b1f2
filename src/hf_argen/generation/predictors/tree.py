"""Tokens that were fed to a model but are not yet part of the sequence, and who of them sees whom."""

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
        # Who sees whom, (batch, nodes or more + 1, nodes or more) bool; what continues the sequence alone sees row 0.
        self._table: torch.Tensor | None = None

    @property
    def is_chain(self) -> bool:
        """Whether each node continues the one before it."""
        return self._parents is None

    def grow(self, n: int, parents: torch.Tensor | None, batch_size: int, device: torch.device) -> None:
        """Adds `n` nodes: `parents` (batch, n) int64 for each, or `None` to continue the last one in a chain."""
        if parents is None and self.is_chain:
            self.size += n
            return
        is_level = parents is not None
        if self._parents is None:
            self._parents = torch.arange(-1, self.size - 1, device=device).repeat(batch_size, 1)
        if parents is None:
            parents = torch.arange(self.size - 1, self.size + n - 1, device=device).repeat(batch_size, 1)
        parents = parents.to(device)
        # Looked up only where that costs nothing: whether they continue nodes of earlier calls alone.
        is_level = is_level and device.type == "cpu" and int(parents.max()) < self.size
        self._table = self._with_level(parents, batch_size) if is_level else None
        self._parents = torch.cat([self._parents, parents], dim=1)
        self.size += n

    def _with_level(self, parents: torch.Tensor, batch_size: int) -> torch.Tensor:
        """`_table` with nodes of which none continues another: each sees what its parent sees, and itself."""
        n, size = parents.shape[1], self.size
        table = self._table
        if table is None or table.shape[2] < size + n:
            room = 2 * (size + n)
            table = torch.zeros(batch_size, room + 1, room, dtype=torch.bool, device=parents.device)
            if size:
                table[:, 1 : size + 1, :size] = self.ancestors(size, parents.device)
        index = parents + 1
        if batch_size == 1:
            above = table[0].index_select(0, index[0])
        else:
            above = table.gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[2]))
        table[:, size + 1 : size + 1 + n] = above
        table[:, size + 1 :, size:].diagonal(dim1=1, dim2=2)[:, :n].fill_(True)
        return table

    def ancestors(self, n: int, device: torch.device) -> torch.Tensor:
        """(batch or 1, n, size) bool: which nodes the last `n` see, themselves included."""
        if self._parents is None:
            seen = torch.ones(self.size, self.size, dtype=torch.bool, device=device).tril()
            return seen[None, -n:]
        if self._table is None:
            self._table = torch.nn.functional.pad(self._closure(device), (0, 0, 1, 0))
        return self._table[:, self.size + 1 - n : self.size + 1, : self.size]

    def _closure(self, device: torch.device) -> torch.Tensor:
        # Everyone sees himself and his parent; squaring doubles the generations that are seen.
        seen = torch.nn.functional.one_hot(self._parents + 1, self.size + 1)[..., 1:].float()
        seen = seen + torch.eye(self.size, device=device)
        for _ in range((self.size - 1).bit_length()):
            seen = (seen @ seen).clamp(max=1)
        return seen > 0

    def depths(self, n: int, device: torch.device) -> torch.Tensor:
        """(batch or 1, n) int64: how many nodes lie before each of the last `n` on its path."""
        if self._parents is None:
            return torch.arange(self.size - n, self.size, device=device)[None]
        return self.ancestors(n, device).sum(dim=-1) - 1

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows."""
        self._table = None
        if self._parents is not None:
            self._parents = self._parents.index_select(0, rows)
