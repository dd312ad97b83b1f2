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
        is_level = is_level and device.type == "cpu" and bool((parents < self.size).all())
        self._seen = self._with_level(parents, batch_size) if is_level else None
        self._parents = torch.cat([self._parents, parents], dim=1)
        self.size += n

    def _with_level(self, parents: torch.Tensor, batch_size: int) -> torch.Tensor:
        """`_seen` with nodes of which none continues another: each sees what its parent sees, and itself."""
        n, size = parents.shape[1], self.size
        new = torch.eye(n, dtype=torch.bool, device=parents.device).expand(batch_size, -1, -1)
        if size == 0:
            return new
        old = self.ancestors(size, parents.device).expand(batch_size, -1, -1)
        above = torch.nn.functional.pad(old, (0, 0, 1, 0))  # -1 sees nothing of the nodes
        above = above.gather(1, (parents + 1).unsqueeze(-1).expand(-1, -1, size))
        grown = old.new_zeros(batch_size, size + n, size + n)
        grown[:, :size, :size], grown[:, size:, :size], grown[:, size:, size:] = old, above, new
        return grown

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
