"""
What happens to queries and keys between their projection and attention: L2, RMS or layer norm (QK norm, arXiv
2010.04245), rotary embedding (arXiv 2104.09864), and the write of keys and values into a preallocated cache.
"""

from typing import NamedTuple

import torch

from .. import checks
from ..dispatch import may_run, runs_kernel
from ..library import NAMESPACE, contiguous_rows
from . import reference
from .rotation import Rotation

__all__ = ["Rotation", "Slot", "qk_norm_rope"]

NAME = "qk_norm_rope"
NORMS = (None, "l2", "rms", "layer")
MAX_HEAD_DIM = 512  # of the kernel


class Slot(NamedTuple):
    """
    Where in a cache new positions go.

    Attributes:
        keys, values: (batch, key heads, capacity, head_dim).
        places: (batch, n) int64, the place of each new position; `None`: one after another from `start` on.
        start: the first place.
    """

    keys: torch.Tensor
    values: torch.Tensor
    places: torch.Tensor | None = None
    start: int = 0


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None = None,
    *,
    norm: str | None = None,
    eps: float = 1e-6,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
    rotation: Rotation | None = None,
    slot: Slot | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Normalises queries and keys over the channels of each head, scales queries, turns both, and writes keys and values into
    a cache.

    Args:
        query: (batch, heads, n, head_dim) float32, bfloat16 or float16; head_dim is even.
        key, value: (batch, key heads, n, head_dim); `value` is needed with a `slot` only.
        norm: "l2" (x / max(|x|, eps)), "rms" (x / sqrt(mean(x^2) + eps)), "layer" (layer norm) or `None`.
        query_weight, key_weight, query_bias, key_bias: (head_dim,), of RMS and layer norms; biases of layer norms only.
        query_scale: (heads,), times the normalised queries.
        rotation: of every token, float32.
        slot: where keys and values go; they are converted to its dtype.

    Returns:
        queries and keys; with `slot` all keys of the cache. No gradients pass the kernel: where they are needed, the reference
        runs.

    Raises:
        ValueError: an unknown norm, positions beyond the capacity, shapes, dtypes or devices that do not fit.
    """
    if norm not in NORMS:
        raise ValueError(f"{NAME}: norm is {norm!r}; it must be one of {', '.join(map(repr, NORMS))}.")
    if not (runs_here(query) and query.shape[-1] <= MAX_HEAD_DIM) or _needs_gradient(query, key):
        query, key = reference.qk_norm_rope(
            query, key, norm=norm, eps=eps, query_weight=query_weight, key_weight=key_weight,
            query_bias=query_bias, key_bias=key_bias, query_scale=query_scale, rotation=rotation,
        )  # fmt: skip
        if slot is None:
            return query, key
        reference.write(key, value, *slot)
        return query, slot.keys
    cos, sin = (None, None) if rotation is None else rotation.tables()
    interleaved = rotation is None or rotation.interleaved
    weights = tuple(contiguous_rows(one) for one in (query_weight, key_weight, query_bias, key_bias))
    query_scale = contiguous_rows(query_scale)
    _check(query, key, value, norm, weights, query_scale, cos, sin, slot)
    given = (query_scale, cos, sin, interleaved)
    if slot is None:
        return _operation(query, key, norm or "", eps, *weights, *given)
    query = _cached_operation(
        query, key, value, slot.keys, slot.values, slot.places, slot.start, norm or "", eps, *weights, *given
    )
    return query, slot.keys


def runs_here(query: torch.Tensor) -> bool:
    """Whether a kernel handles queries (batch, heads, n, head_dim), as far as mode, device and size say."""
    if not may_run(query):
        return False
    rows, head_dim = query.shape[:-1].numel(), query.shape[-1]
    return runs_kernel(query, NAME, rows=rows, head_dim=head_dim)


def _needs_gradient(query: torch.Tensor, key: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    norm: str | None,
    weights: tuple[torch.Tensor | None, ...],
    query_scale: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slot: Slot | None,
) -> None:
    checks.shape(NAME, "query", query, None, None, None, None)
    batch, heads, n, head_dim = query.shape
    if head_dim % 2:
        raise ValueError(f"{NAME}: heads have {head_dim} channels; the number must be even.")
    named = dict(zip(("query_weight", "key_weight", "query_bias", "key_bias"), weights, strict=True))
    states = {"query": query, "key": key, "value": value}
    checks.dtypes(NAME, checks.FLOATS, **states, **named, query_scale=query_scale)
    checks.dtypes(NAME, (torch.float32,), cos=cos, sin=sin)
    checks.shape(NAME, "key", key, batch, None, n, head_dim)
    checks.shape(NAME, "value", value, *key.shape)
    for name, weight in named.items():
        checks.shape(NAME, name, weight, head_dim)
        if weight is not None and norm not in (("layer",) if "bias" in name else ("rms", "layer")):
            raise ValueError(f"{NAME}: {name} came with norm={norm!r}, which has none; leave it out.")
    for kind in (0, 2):
        if (weights[kind] is None) != (weights[kind + 1] is None):
            raise ValueError(
                f"{NAME}: weights and biases of queries and keys come together; give both or neither."
            )
    checks.shape(NAME, "query_scale", query_scale, heads)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.shape(
            NAME, name, table, 1 if table is not None and len(table) == 1 else batch, n, head_dim // 2
        )
    cache = {} if slot is None else {"keys": slot.keys, "values": slot.values, "places": slot.places}
    checks.same_device(NAME, **states, **named, query_scale=query_scale, cos=cos, sin=sin, **cache)
    if slot is not None:
        _check_slot(key, value, slot)


def _check_slot(key: torch.Tensor, value: torch.Tensor | None, slot: Slot) -> None:
    batch, key_heads, n, head_dim = key.shape
    if value is None:
        raise ValueError(f"{NAME}: a slot came without values; give those of the keys.")
    for name, cache in (("keys", slot.keys), ("values", slot.values)):
        checks.shape(NAME, name, cache, batch, key_heads, None, head_dim)
        if cache.stride(-1) != 1:
            raise ValueError(
                f"{NAME}: the channels of the cached {name} are not contiguous; allocate them as the last dimension."
            )
    checks.shape(NAME, "places", slot.places, batch, n)
    checks.dtypes(NAME, (torch.int64,), places=slot.places)
    capacity = slot.keys.shape[2]
    if slot.places is None and not 0 <= slot.start <= slot.start + n <= capacity:
        raise ValueError(
            f"{NAME}: positions {slot.start} to {slot.start + n - 1} do not fit into a cache of {capacity}; allocate a larger one."
        )


@torch.library.custom_op(f"{NAMESPACE}::qk_norm_rope", mutates_args=())
def _operation(
    query: torch.Tensor,
    key: torch.Tensor,
    norm: str,
    eps: float,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    query_scale: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import triton

    outputs = (query.new_empty(query.shape), key.new_empty(key.shape))
    triton.launch(
        contiguous_rows(query), contiguous_rows(key), None, (*outputs, None), norm or None, eps,
        (query_weight, key_weight, query_bias, key_bias), query_scale, (cos, sin), interleaved, None, 0,
    )  # fmt: skip
    return outputs


@_operation.register_fake
def _outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    norm: str,
    eps: float,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    query_scale: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@torch.library.custom_op(f"{NAMESPACE}::qk_norm_rope_cached", mutates_args=("keys", "values"))
def _cached_operation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor | None,
    start: int,
    norm: str,
    eps: float,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    query_scale: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> torch.Tensor:
    from . import triton

    output = query.new_empty(query.shape)
    triton.launch(
        contiguous_rows(query), contiguous_rows(key), contiguous_rows(value), (output, keys, values), norm or None, eps,
        (query_weight, key_weight, query_bias, key_bias), query_scale, (cos, sin), interleaved,
        None if places is None else places.contiguous(), start,
    )  # fmt: skip
    return output


@_cached_operation.register_fake
def _cached_output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor | None,
    start: int,
    norm: str,
    eps: float,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    query_scale: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> torch.Tensor:
    return query.new_empty(query.shape)
