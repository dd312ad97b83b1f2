"""Rejection sampling along chains and over trees of drafts, in plain PyTorch: the definition."""

import torch

WRONG_NUMBERS, WRONG_TREE = -1, -2  # in place of a length


def verify_draft(
    target: torch.Tensor,
    tokens: torch.Tensor,
    draft: torch.Tensor | None,
    uniform: torch.Tensor | None,
    noise: torch.Tensor | None,
    lengths: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See [`hf_argen.kernels.verify_draft.verify_draft`]."""
    batch, n = tokens.shape
    node = torch.arange(n, device=tokens.device)
    if parents is None:
        parents = (node - 1).expand(batch, n)
    exists = (node < (n if lengths is None else lengths[:, None])).expand(batch, n)
    is_tree = ~(exists & ((parents >= node) | (parents < -1))).any(dim=1)
    if lengths is not None:
        is_tree &= (lengths >= 0) & (lengths <= n)
    state = tokens.new_full((batch,), -1)
    count = torch.zeros_like(state)
    path = torch.full_like(tokens, -1)
    left = target[:, 0]
    for i in range(n):
        tested = exists[:, i] & (parents[:, i] == state) & is_tree
        passes = _passes(left, tokens[:, i], draft, uniform, i)
        if noise is not None:
            rest = _rest(left, target.gather(1, _row(state + 1, target))[:, 0], tokens[:, i], draft, i)
            left = torch.where((tested & ~passes)[:, None], rest, left)
        accepted = tested & passes
        left = torch.where(accepted[:, None], target[:, i + 1], left)
        place = node == count[:, None]
        path = torch.where(accepted[:, None] & place, i, path)
        state = torch.where(accepted, i, state)
        count = count + accepted
    total = left.sum(dim=-1)
    is_sound = total.isfinite() & (total > 0)
    drawn = (left if noise is None else left / noise).argmax(dim=-1)
    fine = is_tree & is_sound
    count = torch.where(fine, count, torch.where(is_tree, WRONG_NUMBERS, WRONG_TREE))
    return torch.where(fine[:, None], path, -1), count, torch.where(fine, drawn, 0)


def _row(index: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return index[:, None, None].expand(-1, 1, target.shape[-1])


def _passes(
    left: torch.Tensor,
    token: torch.Tensor,
    draft: torch.Tensor | None,
    uniform: torch.Tensor | None,
    i: int,
) -> torch.Tensor:
    """Whether a draft passes: by min(1, p / q), or greedily."""
    if uniform is None:
        return left.argmax(dim=-1) == token
    chance = left.gather(-1, token[:, None])[:, 0]
    if draft is not None:
        own = draft[:, i].gather(-1, token[:, None])[:, 0]
        chance = chance / own.clamp(min=torch.finfo(own.dtype).tiny)
    return uniform[:, i] < chance.clamp(max=1.0)


def _rest(
    left: torch.Tensor, target: torch.Tensor, token: torch.Tensor, draft: torch.Tensor | None, i: int
) -> torch.Tensor:
    """What a rejected draft leaves: max(p - q, 0), normalised; the target itself where nothing is left."""
    if draft is None:
        rest = left.scatter(-1, token[:, None], 0.0)
    else:
        rest = (left - draft[:, i]).clamp(min=0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), target)
