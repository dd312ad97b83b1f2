"""Drafts of several independent sequences, accepted by optimal transport (SpecTr, arXiv 2310.15141)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...sampling import acceptance, one_hot
from .acceptance import AcceptanceRule, Verdict, Walk
from .draft_tree import DraftContext, DraftTree

HALVINGS = 30


@dataclass
class SpecTr(AcceptanceRule):
    """
    k-sequential selection (k-SEQ): the candidates of a place, drawn independently from q, are tried one after another
    and each is kept with min(1, p / (rho q)); rho is chosen so that what is kept of a token is never more than p.
    """

    needs_independent: ClassVar[bool] = True

    def sample(self, scores: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        return Walk(scores.softmax(dim=-1), tree, context).run(self._level)

    @staticmethod
    def _level(walk: Walk, candidates: torch.Tensor) -> None:
        q = walk.drawn_from()
        if q is None:  # one certain draft a place, as those that were copied
            q = one_hot(walk.token(candidates[:, 0]), walk.probs)
        number = (candidates > 0).sum(dim=1)
        rho = division_factor(walk.probs, q, number)
        for node in candidates.unbind(1):
            tries = walk.tries(node)
            if walk.nobody(tries):
                continue
            token = walk.token(node)[:, None]
            walk.accept(node, tries, acceptance(walk.probs.gather(1, token), rho * q.gather(1, token))[:, 0])
        walk.probs = torch.where((number > 0)[:, None], left_over(walk.probs, q, rho, number), walk.probs)


def kept_share(p: torch.Tensor, q: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
    """(batch, 1): how probably a candidate is kept, sum of min(q, p / rho)."""
    return torch.minimum(q, p / rho).sum(dim=-1, keepdim=True)


def division_factor(p: torch.Tensor, q: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """
    The smallest rho of [1, k] with 1 - (1 - share) ** k <= rho * share, by bisection.

    Args:
        p, q: (batch, vocab_size).
        number: (batch,) int64, candidates k of each row.

    Returns:
        (batch, 1).
    """
    k = number[:, None].to(p.dtype)
    low, high = torch.ones_like(k), k.clamp(min=1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        share = kept_share(p, q, middle)
        fits = 1 - (1 - share) ** k <= middle * share
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return high


def left_over(p: torch.Tensor, q: torch.Tensor, rho: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """(batch, vocab_size): what the token is drawn from when all candidates were rejected; p where nothing is left."""
    tiny = torch.finfo(p.dtype).tiny
    share = kept_share(p, q, rho)
    some = 1 - (1 - share) ** number[:, None]
    rest = (p - torch.minimum(q, p / rho) * some / share.clamp(min=tiny)).clamp(min=0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=tiny), p)
