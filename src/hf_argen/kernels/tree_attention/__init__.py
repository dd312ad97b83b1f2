"""
Attention of new nodes to a preallocated cache and to their ancestors among the nodes: one token, a Jacobi window, a tree of
drafts (SpecInfer, arXiv 2305.09781), a block, or one scale, whose nodes all see each other.
"""

import torch

from .. import checks
from ..dispatch import runs_kernel
from ..library import NAMESPACE, contiguous_rows
from . import reference
from .reference import WORD, pack

__all__ = ["pack", "tree_attention"]

NAME = "tree_attention"
MAX_NODES = 256  # new ones of one call; more take the reference
MAX_HEAD_DIM = 256


def tree_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    ancestors: torch.Tensor,
    nodes: int,
    hidden: torch.Tensor | None = None,
    scaling: float | None = None,
    columns: int | None = None,
) -> torch.Tensor:
    """
    A node sees the committed places of its row that are not hidden, and of the nodes behind them those that its bits name.

    Args:
        query: (batch, heads, n, head_dim) float32, bfloat16 or float16, of the last n nodes.
        keys, values: (batch, key heads, capacity, head_dim), those of the nodes included; each head of keys serves
            heads / key heads of the queries. What no one sees may hold anything.
        starts: (batch,) int64, the committed places of each row; its nodes lie from there on.
        ancestors: (batch or 1, n, words) int32, for each of the n the nodes that it sees, itself included:
            `pack(bool (batch or 1, n, nodes))`.
        nodes: how many nodes there are, n of them new.
        hidden: (batch, words) int32, committed places that no one sees (padding, holes): `pack(bool (batch, places))`; places
            beyond it are seen.
        scaling: of the products; default: head_dim ** -0.5.
        columns: the host's bound on starts + nodes; default: the capacity.

    Returns:
        (batch, heads, n, head_dim), dtype of `query`; zeros for a node that sees nothing.

    Raises:
        ValueError: more nodes than there is room for, shapes, dtypes or devices that do not fit.
    """
    columns = keys.shape[2] if columns is None else columns
    _check(query, keys, values, starts, ancestors, nodes, hidden, columns)
    n, head_dim = query.shape[2:]
    needs_gradient = torch.is_grad_enabled() and query.requires_grad
    fits = n <= MAX_NODES and head_dim <= MAX_HEAD_DIM and not needs_gradient
    if not (fits and runs_here(keys, n, columns)):
        return reference.tree_attention(query, keys, values, starts, ancestors, nodes, hidden, scaling)
    scaling = head_dim**-0.5 if scaling is None else scaling
    return _operation(query, keys, values, starts, ancestors, nodes, hidden, scaling, columns)


def runs_here(keys: torch.Tensor, nodes: int, columns: int) -> bool:
    """Whether a kernel handles so many new nodes, as far as mode, device and size of the cache say."""
    batch, key_heads, _, head_dim = keys.shape
    return runs_kernel(
        keys, NAME, key_heads=batch * key_heads, nodes=nodes, columns=columns, head_dim=head_dim
    )


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    ancestors: torch.Tensor,
    nodes: int,
    hidden: torch.Tensor | None,
    columns: int,
) -> None:
    checks.same_device(
        NAME, query=query, keys=keys, values=values, starts=starts, ancestors=ancestors, hidden=hidden
    )
    checks.dtypes(NAME, checks.FLOATS, query=query)
    checks.dtypes(NAME, (query.dtype,), keys=keys, values=values)
    checks.dtypes(NAME, (torch.int64,), starts=starts)
    checks.dtypes(NAME, (torch.int32,), ancestors=ancestors, hidden=hidden)
    checks.shape(NAME, "query", query, None, None, None, None)
    batch, heads, n, head_dim = query.shape
    checks.shape(NAME, "keys", keys, batch, None, None, head_dim)
    checks.shape(NAME, "values", values, *keys.shape)
    key_heads, capacity = keys.shape[1:3]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"{NAME}: {heads} heads of queries cannot share {key_heads} of keys; it must divide them."
        )
    if not n <= nodes <= columns <= capacity:
        raise ValueError(
            f"{NAME}: {n} new of {nodes} nodes and {columns} columns do not fit into a cache of {capacity}; allocate a larger one."
        )
    checks.shape(NAME, "starts", starts, batch)
    rows = 1 if ancestors.ndim == 3 and len(ancestors) == 1 else batch
    checks.shape(NAME, "ancestors", ancestors, rows, n, -(-nodes // WORD))
    checks.shape(NAME, "hidden", hidden, batch, None)


@torch.library.custom_op(f"{NAMESPACE}::tree_attention", mutates_args=())
def _operation(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    ancestors: torch.Tensor,
    nodes: int,
    hidden: torch.Tensor | None,
    scaling: float,
    columns: int,
) -> torch.Tensor:
    from . import triton

    output = query.new_empty(query.shape)
    query, keys, values = (contiguous_rows(one) for one in (query, keys, values))
    hidden = None if hidden is None else hidden.contiguous()
    triton.attend(
        query,
        keys,
        values,
        starts.contiguous(),
        ancestors.contiguous(),
        nodes,
        hidden,
        scaling,
        columns,
        output,
    )
    return output


@_operation.register_fake
def _output(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    ancestors: torch.Tensor,
    nodes: int,
    hidden: torch.Tensor | None,
    scaling: float,
    columns: int,
) -> torch.Tensor:
    return query.new_empty(query.shape)
