"""Grouped speculative decoding (GSD, arXiv 2508.07747): drafts are verified as groups of like tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..sampling import acceptance
from .base import Guarantee, Request
from .speculative_jacobi import Drafts, SpeculativeJacobi


@dataclass
class GroupedSpeculative(SpeculativeJacobi):
    """
    Speculative Jacobi decoding that asks whether the group of a draft is probable enough, not the draft alone.

    The group of a token are those that come next to it when all are sorted by the model's probability, as far as their
    probability and their embedding are close to its own; it is formed anew at every place. A draft passes with
    min(1, p(group) / q(group)), so a token is kept at most as often as its whole group is drawn by the model.

    Args:
        group_size: tokens of a group, at most; 1 is speculative Jacobi decoding.
        max_probability_gap: how much the probability of a member may differ from the draft's.
        max_distance: squared distance of a member's input embedding from the draft's, at most; `None` for any.
    """

    group_size: int = 14
    max_probability_gap: float = 0.15
    max_distance: float | None = 0.5

    guarantee: ClassVar[Guarantee] = Guarantee.RELAXED
    knob: ClassVar[str | None] = "group_size"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise ValueError(
                f"group_size is {self.group_size}; it must be at least 1, which is no relaxation."
            )
        if not 0 <= self.max_probability_gap <= 1:
            raise ValueError(f"max_probability_gap is {self.max_probability_gap}; it must lie in [0, 1].")
        if self.max_distance is not None and self.max_distance < 0:
            raise ValueError(f"max_distance is {self.max_distance}; it must be 0 or above, or None.")

    def acceptance(self, target: torch.Tensor, drafts: Drafts, request: Request) -> torch.Tensor:
        group, is_member = self.groups(target, drafts.tokens, request)
        own = drafts.tokens.unsqueeze(-1)
        # The draft's own share comes apart, so that a group of one is speculative sampling bit by bit.
        others = is_member & (group != own)
        p, q = (
            probs.gather(-1, own) + (probs.gather(-1, group) * others).sum(dim=-1, keepdim=True)
            for probs in (target, drafts.probs)
        )
        return acceptance(p, q).squeeze(-1)

    def groups(
        self, target: torch.Tensor, tokens: torch.Tensor, request: Request
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The candidates (batch, n, group_size) around each draft (batch, n), and which of them are members."""
        vocab = target.shape[-1]
        size = min(self.group_size, vocab)
        order = target.argsort(dim=-1)
        rank = (order == tokens.unsqueeze(-1)).int().argmax(dim=-1, keepdim=True)
        start = (rank - size // 2).clamp(0, vocab - size)
        group = order.gather(-1, start + torch.arange(size, device=target.device))
        own = tokens.unsqueeze(-1)
        is_member = (target.gather(-1, group) - target.gather(-1, own)).abs() < self.max_probability_gap
        if self.max_distance is not None:
            embed = request.model.get_input_embeddings()
            far = (embed(group) - embed(own)).float().square().sum(dim=-1)
            is_member &= far < self.max_distance
        return group, is_member
