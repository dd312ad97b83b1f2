"""A key-value cache that owns its memory from the start and rolls back by moving a pointer."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """
    Keys and values (batch, heads, capacity, head_dim) of one layer, of which the first `length` positions are valid.

    Args:
        capacity: positions to allocate; a longer sequence doubles it unless `fixed`.
        fixed: refuse to grow, so that shapes and addresses stay static.
    """

    def __init__(self, capacity: int, fixed: bool = False):
        super().__init__()
        self.capacity = capacity
        self.fixed = fixed
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], self.capacity, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], self.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new positions; returns views on all valid ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            self._grow(end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grow(self, needed: int) -> None:
        if self.fixed:
            raise ValueError(
                f"The cache holds {self.capacity} positions, {needed} are needed; raise max_length."
            )
        self.capacity = max(needed, 2 * self.capacity)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], self.capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def truncate(self, length: int) -> None:
        """Forgets all positions from `length` on."""
        self.length = min(self.length, length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows of the batch."""
        if self.is_initialized:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def reset(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity if self.fixed else -1

    # The name of `get_max_length` in older releases of transformers.
    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class PreallocatedCache(Cache):
    """
    One [`PreallocatedLayer`] per transformer layer, and a memo of what a layer computes from the request alone.

    Args:
        num_layers: transformer layers.
        capacity, fixed: see [`PreallocatedLayer`].
    """

    def __init__(self, num_layers: int, capacity: int, fixed: bool = False):
        super().__init__(layers=[PreallocatedLayer(capacity, fixed) for _ in range(num_layers)])
        self.memo: dict[Any, torch.Tensor] = {}

    def remember(self, key: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor stored under `key`, computed on the first call; for values that no step changes."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def truncate(self, length: int) -> None:
        """Rolls every layer back to its first `length` positions."""
        for layer in self.layers:
            layer.truncate(length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows of the batch in every layer and in the memo."""
        for layer in self.layers:
            layer.select_rows(rows)
        self.memo = {key: value.index_select(0, rows.to(value.device)) for key, value in self.memo.items()}
