"""Relaxed acceptance of image tokens (LANTERN, arXiv 2410.03355; LANTERN++, arXiv 2502.06352)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...sampling import acceptance, bernoulli, categorical, one_hot
from ..base import Guarantee
from .acceptance import AcceptanceRule, Verdict, completed
from .draft_tree import DraftContext, DraftTree

NearestCodes = Callable[[torch.Tensor, int], torch.Tensor]
"""From tokens (...) and a number n to the n codes that are nearest to each, (..., n), nearest first, itself excluded."""


@dataclass
class Relaxation:
    """
    Lends a drafted token the probability of the codes around it, within a bound.

    The codes are added up from the nearest on, as long as their sum stays within `delta`, or with `factor` within
    (factor - 1) times the token's own probability.

    Args:
        nearest: who is near whom.
        k: codes that may be added up, at most.
        delta: total-variation distance by which the distribution may be distorted for a token, in [0, 1].
        factor: how many times its own probability a token may get instead, 1 or above; replaces `delta`.
    """

    nearest: NearestCodes
    k: int
    delta: float
    factor: float | None = None

    @property
    def is_off(self) -> bool:
        """Whether nothing may be added."""
        return self.k == 0 or (self.delta == 0 if self.factor is None else self.factor == 1)

    def relaxed(self, target: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            target: (..., vocab_size) the model's distribution.
            tokens: (...) int64.

        Returns:
            probabilities (...) of the tokens with what they are lent, and whether the bound admits any neighbour.
        """
        own = target.gather(-1, tokens.unsqueeze(-1))
        if self.is_off:
            return own.squeeze(-1), torch.zeros_like(tokens, dtype=torch.bool)
        sums = target.gather(-1, self.nearest(tokens, self.k)).cumsum(dim=-1)
        bound = self.delta if self.factor is None else (self.factor - 1) * own
        admitted = (sums <= bound).sum(dim=-1, keepdim=True)
        lent = torch.where(admitted > 0, sums.gather(-1, (admitted - 1).clamp(min=0)), 0.0)
        return (own + lent).squeeze(-1), admitted.squeeze(-1) > 0

    def remaining(
        self, target: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, has_neighbours: torch.Tensor
    ) -> torch.Tensor:
        """
        The distribution (..., vocab_size) from which a rejected token is redrawn: what the draft's distribution, its
        share on the neighbours left out, does not explain of the target's.
        """
        if not self.is_off:
            near = self.nearest(tokens, self.k + 1)
            kept = draft.scatter(-1, near, 0.0)
            draft = torch.where(has_neighbours.unsqueeze(-1), kept, draft)
        rest = (target - draft).clamp(min=0)
        total = rest.sum(dim=-1, keepdim=True)
        return torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), target)


@dataclass
class LendingAcceptance(AcceptanceRule):
    """
    Rejection sampling along a chain, with probabilities that drafts are lent.

    Args:
        rule: how much they are lent.
    """

    rule: Relaxation

    is_offered: ClassVar[bool] = False
    guarantee: ClassVar[Guarantee] = Guarantee.RELAXED

    def verify(self, scores: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        # A draft may also become the best token by what it is lent.
        return self.sample(scores, tree, context)

    def sample(self, scores: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        probs, drafts = scores.softmax(dim=-1), tree.tokens
        target = probs[:, :-1]
        value, has_neighbours = self.rule.relaxed(target, drafts)
        if context.do_sample:
            drawn_from = one_hot(drafts, target) if tree.probs is None else tree.probs
            own = drawn_from.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
            accepted = bernoulli(acceptance(value, own), context.generator)
            rest = self.rule.remaining(target, drawn_from, drafts, has_neighbours)
        else:
            raised = target.scatter(-1, drafts.unsqueeze(-1), value.unsqueeze(-1))
            accepted = raised.argmax(dim=-1) == drafts
            rest = target
        first = accepted.long().cumprod(dim=1).sum(dim=1)
        at = first[:, None, None].expand(-1, 1, probs.shape[-1])
        final = torch.cat([rest, probs[:, -1:]], dim=1).gather(1, at)  # the one place that is drawn
        drawn = categorical(final, context.generator) if context.do_sample else final.argmax(dim=-1)
        nodes = torch.arange(probs.shape[1], device=probs.device).expand(len(probs), -1)
        return completed(nodes, first + 1, drawn[:, 0], tree)


def nearest_by_distance(codes: torch.Tensor) -> NearestCodes:
    """Neighbours in a codebook (vocab_size, dim), by Euclidean distance."""

    def nearest(tokens: torch.Tensor, number: int) -> torch.Tensor:
        flat = tokens.reshape(-1)
        distances = torch.cdist(codes[flat], codes)
        distances.scatter_(1, flat[:, None], torch.inf)
        number = min(number, len(codes) - 1)
        return distances.topk(number, dim=1, largest=False).indices.view(*tokens.shape, number)

    return nearest


def nearest_by_table(table: torch.Tensor) -> NearestCodes:
    """Neighbours out of a table (vocab_size, number), nearest first."""
    return lambda tokens, number: table[tokens][..., :number].long()
