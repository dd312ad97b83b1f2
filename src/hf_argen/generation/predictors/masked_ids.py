"""Predictor of masked models whose tokens are ids (MaskGIT, arXiv 2202.04200)."""

from typing import Any

import torch

from ..guidance import linear
from .masked import MaskedPredictor


class MaskedIdPredictor(MaskedPredictor):
    """
    As [`MaskedPredictor`]; tokens are ids, (batch, n, 1) int64, and a schedule of guidance that is a function gets the step.

    What is drawn at places that stay hidden can be shown, see `propose`; the model does not see it.
    """

    def start(self, inputs: dict[str, Any]) -> None:
        super().start(inputs)
        self._tokens = self._tokens.long()

    @property
    def tokens(self) -> torch.Tensor:
        """(batch, tokens, 1) int64; what was proposed last, or 0, where nothing is committed."""
        return super().tokens

    def propose(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """Puts tokens (batch, n, 1) at positions (batch, n) without making them known."""
        self._tokens = self._tokens.scatter(1, positions.unsqueeze(-1), tokens)

    def strength(self, step: int, num_steps: int, known: int) -> float:
        # As in Muse (arXiv 2301.00704) the linear schedule would reach its end one step after the last.
        if self.guidance.factor is linear:
            return self.guidance.strength(step, num_steps + 1)
        return self.guidance.strength(step, num_steps)

    def passes(self, strength: float) -> int:
        """Passes that the authors' sampler makes in a step of this strength: one where nothing guides."""
        return 2 if strength > 0 or self.guidance.neutral > 0 else 1
