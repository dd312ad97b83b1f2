"""DiSA: fewer steps of the head as more of the picture is known (arXiv 2505.20297)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

from ..predictors.masked import MaskedPredictor
from .base import Guarantee, Request
from .masked import Masked, Plan

ANNEALINGS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda step, last: (last - step) / last,
    "cosine": lambda step, last: (math.cos(math.pi * step / last) + 1) / 2,
    "two_stage": lambda step, last: float(step < last / 2),
    "constant": lambda step, last: 0.0,
}
"""Share, of the steps between least and most, that is taken at `step` of 0 to `last`."""


@dataclass
class DiffusionStepAnnealing(Masked):
    """
    Early tokens are drawn with many steps of the head, later ones, which the known tokens leave less open, with few. Nothing
    is trained. For heads that draw step by step: diffusion, flow, shortcut.

    Args:
        most_head_steps: at the first step of the decoding.
        least_head_steps: at the last.
        annealing: how the number falls: "linear", "cosine", "two_stage" (the most in the first half, then the least) or
            "constant" (the least throughout).
    """

    most_head_steps: int = 50
    least_head_steps: int = 5
    annealing: str = "linear"

    guarantee: ClassVar[Guarantee] = Guarantee.RELAXED
    knob: ClassVar[str | None] = "least_head_steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("most_head_steps", "least_head_steps"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if self.least_head_steps > self.most_head_steps:
            raise ValueError(
                f"least_head_steps is {self.least_head_steps}, above most_head_steps, {self.most_head_steps}."
            )
        if self.annealing not in ANNEALINGS:
            raise ValueError(f"annealing is {self.annealing!r}; known are {', '.join(ANNEALINGS)}.")

    @classmethod
    def fits(cls, model: Any) -> bool:
        """Models whose head takes a number of steps; a class, whose head is not known, may have such."""
        if not super().fits(model) or not model.draws_latents:
            return False
        head = getattr(model, "head", None)
        return head is None or "num_steps" in head.sample_options()

    def check(self, request: Request) -> None:
        super().check(request)
        head = request.model.head
        head.check_num_steps(head.nearest_num_steps(self.most_head_steps))

    def head_steps(self, step: int, num_steps: int) -> int:
        """Steps of the head at `step` of `num_steps`."""
        share = ANNEALINGS[self.annealing](step, num_steps - 1) if num_steps > 1 else 1.0
        return self.least_head_steps + int(share * (self.most_head_steps - self.least_head_steps))

    def head_options(
        self, request: Request, predictor: MaskedPredictor, plan: Plan, step: int
    ) -> dict[str, Any]:
        asked = self.head_steps(step, len(plan.known) - 1)
        return {"num_steps": request.model.head.nearest_num_steps(asked)}
