"""Attention of nodes to a cache and to their ancestors, in plain PyTorch: the definition."""

import torch

WORD = 32  # bits of a mask in one integer


def pack(bits: torch.Tensor) -> torch.Tensor:
    """(..., n) bool to (..., ceil(n / 32)) int32, the first one in the lowest bit."""
    words = -(-bits.shape[-1] // WORD)
    padded = torch.nn.functional.pad(bits, (0, words * WORD - bits.shape[-1])).unflatten(-1, (words, WORD))
    worth = torch.ones((), dtype=torch.int64, device=bits.device) << torch.arange(WORD, device=bits.device)
    total = (padded.long() * worth).sum(dim=-1)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def unpack(words: torch.Tensor, n: int) -> torch.Tensor:
    """The first `n` bits (..., n) bool of what [`pack`] made."""
    place = torch.arange(WORD, device=words.device)
    return ((words.unsqueeze(-1) >> place) & 1).flatten(-2)[..., :n].bool()


def tree_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    ancestors: torch.Tensor,
    nodes: int,
    hidden: torch.Tensor | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """See [`hf_argen.kernels.tree_attention.tree_attention`]."""
    _batch, heads, _n, head_dim = query.shape
    groups, capacity = heads // keys.shape[1], keys.shape[2]
    scaling = head_dim**-0.5 if scaling is None else scaling
    seen = visible(starts, ancestors, nodes, capacity, hidden)[:, None]
    key, value = (part.repeat_interleave(groups, dim=1).float() for part in (keys, values))
    # What no one sees may be anything, NaN included.
    used = seen.any(dim=2).unsqueeze(-1)
    key, value = torch.where(used, key, 0.0), torch.where(used, value, 0.0)
    scores = (query.float() @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    weights = torch.where(seen.any(dim=-1, keepdim=True), scores, 0.0).softmax(dim=-1)
    weights = torch.where(seen, weights, 0.0)
    return (weights @ value).to(query.dtype)


def visible(
    starts: torch.Tensor, ancestors: torch.Tensor, nodes: int, capacity: int, hidden: torch.Tensor | None
) -> torch.Tensor:
    """(batch, n, capacity) bool: the columns that each node sees."""
    column = torch.arange(capacity, device=starts.device)
    node = column - starts[:, None]
    bits = unpack(ancestors, nodes).expand(len(starts), -1, -1)
    index = node.clamp(0, nodes - 1)[:, None].expand(-1, bits.shape[1], -1)
    seen = (node < 0)[:, None] | (bits.gather(2, index) & ((node >= 0) & (node < nodes))[:, None])
    if hidden is not None:
        holes = torch.nn.functional.pad(unpack(hidden, hidden.shape[1] * WORD), (0, capacity))[:, :capacity]
        seen = seen & ~(holes & (node < 0))[:, None]
    return seen
