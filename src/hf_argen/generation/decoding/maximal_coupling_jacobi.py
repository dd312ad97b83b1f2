"""Speculative Jacobi decoding with coupled drafts (MC-SJD, arXiv 2510.24211)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from ..sampling import Generators, categorical, one_hot, residual
from .base import Guarantee
from .speculative_jacobi import Drafts, SpeculativeJacobi


@dataclass
class MaximalCouplingJacobi(SpeculativeJacobi):
    """
    As speculative Jacobi decoding, but a draft that is not reached yet stays as it is as probably as its old and new
    distribution allow: the test and redraw of speculative sampling are applied to every place of the window, which
    couples consecutive drafts maximally. Stable drafts are accepted more often.
    """

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT_IN_DISTRIBUTION

    def draw(
        self,
        probs: torch.Tensor,
        drafts: Drafts,
        accepted: torch.Tensor,
        first: torch.Tensor,
        generator: Generators,
    ) -> torch.Tensor:
        stays = F.pad(accepted, (0, 1)).unsqueeze(-1)
        fixed = one_hot(F.pad(drafts.tokens, (0, 1)), probs)
        redrawn = torch.cat([residual(probs[:, :-1], drafts.probs), probs[:, -1:]], dim=1)
        return categorical(torch.where(stays, fixed, redrawn), generator)
