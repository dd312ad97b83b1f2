"""A key-value cache that owns its memory from the start and rolls back by moving a pointer."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ...kernels.qk_norm_rope import Slot
from ...kernels.qk_norm_rope.reference import write


class TreeView(NamedTuple):
    """
    What the last nodes see of a cache, as `kernels.tree_attention` takes it, in place of a mask.

    Attributes:
        starts: (rows,) int64, where the committed positions of each row end and its nodes begin.
        ancestors: (rows or 1, n, words) int32, packed, the nodes that each of the last n sees.
        nodes: how many nodes there are.
        hidden: (rows, words) int32, packed, padding of the prompt; `None` without.
    """

    starts: torch.Tensor
    ancestors: torch.Tensor
    nodes: int
    hidden: torch.Tensor | None = None

    def to(self, device: torch.device) -> "TreeView":
        hidden = None if self.hidden is None else self.hidden.to(device)
        return TreeView(self.starts.to(device), self.ancestors.to(device), self.nodes, hidden)


Memory = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def with_capacity(like: torch.Tensor, capacity: int) -> tuple[int, ...]:
    """The shape (batch, heads, n, head_dim) with another number of positions."""
    return (*like.shape[:2], capacity, like.shape[3])


def zeros(keys: torch.Tensor, values: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for `capacity` positions of keys and of values (batch, heads, n, head_dim)."""
    # Zeros, since a hidden position still takes part in the sum over values, with weight 0, and 0 * NaN is NaN.
    one, other = (like.new_zeros(with_capacity(like, capacity)) for like in (keys, values))
    return one, other


class PreallocatedLayer(CacheLayerMixin):
    """
    Keys and values (batch, heads, capacity, head_dim) of one layer, of which the first `length` positions are valid.

    Rows of the batch may be of unequal length: then new positions go where `places` says, row by row, and what lies
    between the end of a shorter row and `length` is zeros or old values, which the attention mask has to hide.

    Args:
        capacity: positions to allocate; a longer sequence doubles it unless `fixed`.
        fixed: refuse to grow, so that addresses stay static.
        whole: give attention all positions, empty ones too, so that shapes stay static; the mask has to hide them.
        memory: gives the memory for what keys and values look like, and a capacity.
    """

    def __init__(self, capacity: int, fixed: bool = False, whole: bool = False, memory: Memory | None = None):
        super().__init__()
        self.capacity = capacity
        self.fixed = fixed
        self.whole = whole
        self._memory = memory or zeros
        self.length = 0
        self.places: torch.Tensor | None = None
        self.value_weights: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._memory(key_states, value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds new positions, at the end or at `places`; returns views on all valid ones."""
        write(key_states, value_states, *self.claim(key_states, value_states))
        return self.filled()

    def claim(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Slot:
        """Makes room for new positions, which count from now on, and says where they have to be written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.places is not None:
            return Slot(self.keys, self.values, self.places.to(self.keys.device))
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.capacity:
            self._grow(end)
        self.length = end
        return Slot(self.keys, self.values, None, start)

    def filled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views on the keys and values of all valid positions."""
        stop = self.capacity if self.whole else self.length
        values = self.values[:, :, :stop]
        if self.value_weights is not None:
            weights = self.value_weights.to(values.device, values.dtype)
            values = values * weights[:, None, :stop, None]
        return self.keys[:, :, :stop], values

    def expect(self, places: torch.Tensor, length: int) -> None:
        """Makes the next `update` write to `places` (batch, new positions) int64, after which `length` are valid."""
        if length > self.capacity:
            self._grow(length)
        self.places, self.length = places, length

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies the positions `source` (batch, n) of each row to `target` (batch, n)."""
        if self.is_initialized:
            index = source.to(self.keys.device)[:, None, :, None]
            moved = (
                tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
                for tensor in (self.keys, self.values)
            )
            write(*moved, self.keys, self.values, target, 0)

    def pack(self, source: torch.Tensor, start: int, row: int = 0, every: int = 1) -> None:
        """Copies the positions `source` (n,) to `start` and after, in `row` and each row that is `every` rows further."""
        if self.is_initialized:
            source = source.to(self.keys.device)
            for tensor in (self.keys[row::every], self.values[row::every]):
                tensor.narrow(2, start, len(source)).copy_(tensor.index_select(2, source))

    def _grow(self, needed: int) -> None:
        if self.fixed:
            raise ValueError(
                f"The cache holds {self.capacity} positions, {needed} are needed; raise max_length."
            )
        self.capacity = max(needed, 2 * self.capacity)
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(with_capacity(old, self.capacity))
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def truncate(self, length: int) -> None:
        """Forgets all positions from `length` on; the next update goes to the end again."""
        self.length = min(self.length, length)
        self.places = None

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows of the batch."""
        if self.is_initialized:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))

    def reset(self) -> None:
        self.length, self.places = 0, None

    def clear(self) -> None:
        """As new, but for its memory, which stays where it is."""
        self.reset()
        self.whole, self.value_weights = False, None
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity if self.fixed else -1

    # The name of `get_max_length` in older releases of transformers.
    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.capacity if self.whole else self.length + query_length), 0


class CommonMemory:
    """
    The memory of all layers in one piece, as long as none asks for another shape or gets memory of its own later; so
    positions of all are copied in a few calls. For a CPU, where memory costs nothing before it is written to.
    """

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self._all: tuple[torch.Tensor, torch.Tensor] | None = None
        self._parts: dict[int, torch.Tensor] = {}
        self._one: PreallocatedLayer | None = None

    def part(
        self, index: int, keys: torch.Tensor, values: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """That of one layer; see [`zeros`]."""
        if keys.device.type != "cpu":
            return zeros(keys, values, capacity)
        if self._all is None:
            one, other = (
                like.new_empty(self.num_layers, *with_capacity(like, capacity)) for like in (keys, values)
            )
            self._all = one, other
        for like, whole in zip((keys, values), self._all, strict=True):
            is_alike = whole.shape[1:] == with_capacity(like, capacity) and whole.dtype == like.dtype
            if not is_alike or index in self._parts:
                return zeros(keys, values, capacity)
        one, other = (whole[index].zero_() for whole in self._all)
        self._parts[index] = one
        return one, other

    def as_one(self, layers: list[PreallocatedLayer]) -> PreallocatedLayer | None:
        """A layer of all layers' rows; `None` unless each of them still has its part."""
        if self._all is None:
            return None
        if any(layer.keys is not self._parts.get(i, layer) for i, layer in enumerate(layers)):
            # So that it is not kept beside their own; a layer that begins later shares with none of these.
            self._all, self._one, self._parts = None, None, {}
        elif self._one is None:
            self._one = PreallocatedLayer(layers[0].capacity)
            self._one.keys, self._one.values = (whole.flatten(0, 1) for whole in self._all)
            self._one.is_initialized = True
        return self._one


class PreallocatedCache(Cache):
    """
    One [`PreallocatedLayer`] per transformer layer, and a memo of what a layer computes from the request alone.

    Args:
        num_layers: transformer layers.
        capacity, fixed, whole: see [`PreallocatedLayer`].
    """

    def __init__(self, num_layers: int, capacity: int, fixed: bool = False, whole: bool = False):
        # Compiled graphs that write to parts of one tensor would have to be written for the whole of it.
        self._common = None if fixed else CommonMemory(num_layers)
        memories = [partial(self._common.part, i) if self._common else None for i in range(num_layers)]
        super().__init__(layers=[PreallocatedLayer(capacity, fixed, whole, memory) for memory in memories])
        self.memo: dict[Any, torch.Tensor] = {}
        self.tree: TreeView | None = None  # where attention goes by it, not by a mask

    def remember(self, key: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor stored under `key`, computed on the first call; for values that no step changes."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers, for layers that are all there from the start."""
        return self.layers[layer_idx].update(key_states, value_states)

    @property
    def capacity(self) -> int:
        """Positions that fit without growing."""
        return self.layers[0].capacity

    @property
    def rows(self) -> int | None:
        """Rows of the batch; `None` before the first update."""
        first = self.layers[0]
        return len(first.keys) if first.is_initialized else None

    def show_whole(self) -> None:
        """From now on attention gets all positions, see `whole`; a prompt is read before, over its own positions."""
        for layer in self.layers:
            layer.whole = True

    def fix_addresses(self) -> None:
        """Tells torch that the memory stays where it is, so that CUDA graphs may write to it."""
        for layer in self.layers:
            for memory in (layer.keys, layer.values):
                torch._dynamo.mark_static_address(memory, guard=False)

    def clear(self) -> None:
        """Forgets everything; the memory of every layer stays where it is."""
        self.memo, self.tree = {}, None
        for layer in self.layers:
            layer.clear()

    def truncate(self, length: int) -> None:
        """Rolls every layer back to its first `length` positions."""
        for layer in self.layers:
            if layer.length > length or layer.places is not None:  # at one token a step, calls count
                layer.truncate(length)

    def weigh_values(self, weights: torch.Tensor | None) -> None:
        """From now on attention sees the values times `weights` (batch, capacity); what is stored stays as it is."""
        for layer in self.layers:
            layer.value_weights = weights

    def expect(self, places: torch.Tensor, length: int) -> None:
        """Makes the next update of every layer write to `places`; see [`PreallocatedLayer`]."""
        for layer in self.layers:
            layer.expect(places, length)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies positions within each row, in every layer."""
        if (one := self._as_one()) is not None:
            source, target = (part.repeat(len(self.layers), 1) for part in (source, target))
        for layer in self.layers if one is None else [one]:
            layer.move(source, target)

    def pack(self, source: torch.Tensor, start: int, row: int = 0, every: int = 1) -> None:
        """Copies positions to others next to each other, in every layer; see [`PreallocatedLayer`]."""
        one = self._as_one()
        for layer in self.layers if one is None else [one]:
            layer.pack(source, start, row, every)

    def _as_one(self) -> PreallocatedLayer | None:
        return None if self._common is None else self._common.as_one(self.layers)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows of the batch in every layer and in the memo."""
        for layer in self.layers:
            layer.select_rows(rows)
        self.memo = {key: value.index_select(0, rows.to(value.device)) for key, value in self.memo.items()}
