"""Classifier-free guidance (arXiv 2207.12598): how strongly to push away from the unconditional prediction."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

GuidanceSchedule = str | Sequence[float] | Callable[[int, int], float]
"""Name of a schedule, one factor per step, or a function of step and number of steps."""


def constant(step: int, num_steps: int) -> float:
    """The same strength at every step."""
    return 1.0


def linear(step: int, num_steps: int) -> float:
    """From nothing at the first step to full strength at the last, as in VAR (arXiv 2404.02905)."""
    return step / (num_steps - 1) if num_steps > 1 else 1.0


SCHEDULES: dict[str, Callable[[int, int], float]] = {"constant": constant, "linear": linear}


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, strength: float) -> torch.Tensor:
    """(1 + t) * conditional - t * unconditional: t = 0 leaves the conditional logits as they are."""
    return (1 + strength) * conditional - strength * unconditional


@dataclass
class Guidance:
    """
    Strength of guidance over the steps of a generation.

    Args:
        scale: the number that papers print, in the convention of the family; 0 or above.
        schedule: factor on `scale` at each step.

    Raises:
        ValueError: negative scale, unknown schedule.
    """

    scale: float = 0.0
    schedule: GuidanceSchedule = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"guidance_scale is {self.scale}; it must be 0 (no guidance) or above.")
        if isinstance(self.schedule, str):
            is_known = self.schedule in SCHEDULES
        else:
            is_known = callable(self.schedule) or hasattr(self.schedule, "__len__")
        if not is_known:
            raise ValueError(
                f"guidance_schedule is {self.schedule!r}; known are {', '.join(sorted(SCHEDULES))}, a list with one "
                "factor per step, or a function of step and number of steps."
            )

    def strength(self, step: int, num_steps: int) -> float:
        """
        Guidance strength at `step`, counted from 0.

        Raises:
            ValueError: the schedule has no factor for this step, or one that is negative or not finite.
        """
        if isinstance(self.schedule, str):
            factor = SCHEDULES[self.schedule](step, num_steps)
        elif callable(self.schedule):
            factor = self.schedule(step, num_steps)
        elif len(self.schedule) == num_steps:
            factor = self.schedule[step]
        else:
            raise ValueError(
                f"guidance_schedule has {len(self.schedule)} factors; this model takes {num_steps} steps."
            )
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"guidance_schedule gives {factor} at step {step}; every factor must be finite, 0 or above."
            )
        return self.scale * factor

    def is_off(self, num_steps: int) -> bool:
        """Whether no step is guided, so that unconditional rows need not be computed; checks every step."""
        strengths = [self.strength(step, num_steps) for step in range(num_steps)]
        return not any(strengths)
