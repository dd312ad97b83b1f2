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
        self._seen: torch.Tensor | None = None  # who sees whom, until nodes are added

    @property
    def is_chain(self) -> bool:
        """Whether each node continues the one before it."""
        return self._parents is None

    def grow(self, n: int, parents: torch.Tensor | None, batch_size: int, device: torch.device) -> None:
        """Adds `n` nodes: `parents` (batch, n) int64 for each, or `None` to continue the last one in a chain."""
        self._seen = None
        if parents is None and self.is_chain:
            self.size += n
            return
        if self._parents is None:
            self._parents = torch.arange(-1, self.size - 1, device=device).repeat(batch_size, 1)
        if parents is None:
            parents = torch.arange(self.size - 1, self.size + n - 1, device=device).repeat(batch_size, 1)
        self._parents = torch.cat([self._parents, parents.to(device)], dim=1)
        self.size += n

    def ancestors(self, n: int, device: torch.device) -> torch.Tensor:
        """(batch or 1, n, size) bool: which nodes the last `n` see, themselves included."""
        if self._parents is None:
            seen = torch.ones(self.size, self.size, dtype=torch.bool, device=device).tril()
            return seen[None, -n:]
        if self._seen is None:
            self._seen = self._closure(device)
        return self._seen[:, -n:]

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
        self._seen = None
        if self._parents is not None:
            self._parents = self._parents.index_select(0, rows)
