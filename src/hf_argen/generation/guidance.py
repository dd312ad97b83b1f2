"""Classifier-free guidance (arXiv 2207.12598): how strongly to push away from the unconditional prediction."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

ScheduleFunction = Callable[[int, int], float]
GuidanceSchedule = str | Mapping[str, Any] | Sequence[float] | ScheduleFunction
"""Name of a schedule, its name and options as a dict, one factor per step, or a function of step and steps."""


def constant(step: int, num_steps: int) -> float:
    """The same strength at every step."""
    return 1.0


def linear(step: int, num_steps: int) -> float:
    """From nothing at the first step to full strength at the last, as in VAR (arXiv 2404.02905)."""
    return step / (num_steps - 1) if num_steps > 1 else 1.0


@dataclass(frozen=True)
class Interval:
    """
    Full strength within a range of steps, none outside (arXiv 2404.07724).

    LlamaGen's `cfg_interval=k` is `Interval(stop=k + 2)`: the first token and the k + 1 after it.

    Args:
        start, stop: the range, `stop` excluded; `None` for the end.
    """

    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise ValueError(
                f"The guidance interval is [{self.start}, {self.stop}); it must start at 0 or later and not end "
                "before it starts."
            )

    def __call__(self, step: int, num_steps: int) -> float:
        return float(self.start <= step and (self.stop is None or step < self.stop))


@dataclass(frozen=True)
class PowerCosine:
    """
    (1 - cos(pi (step / num_steps) ** power)) / 2: next to nothing at the start, full strength at the end; the larger
    the power, the later it rises (MDTv2, arXiv 2303.14389; RAR, arXiv 2411.00776).

    Args:
        power: 0 or above; 0 is full strength from the first step on.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.power < math.inf:
            raise ValueError(f"The power of the guidance schedule is {self.power}; it must be 0 or above.")

    def __call__(self, step: int, num_steps: int) -> float:
        return (1 - math.cos(math.pi * (step / num_steps) ** self.power)) / 2


@dataclass(frozen=True)
class SoftCFG:
    """
    Guidance by all tokens drawn so far, not by the condition alone (SoftCFG, arXiv 2510.00996).

    In the unconditional rows the attention values of every drawn token are scaled down, the more so the surer the
    conditional prediction was when it was drawn: what the conditional rows know from it then guides, too.

    Args:
        schedule: factor on the strength of guidance at each step.
        normalize: step normalisation: at every step what is taken off sums up to the value of one token, so that the
            disturbance does not grow with the sequence.
    """

    schedule: "GuidanceSchedule" = "constant"
    normalize: bool = True

    def __call__(self, step: int, num_steps: int) -> float:
        return Guidance(1.0, self.schedule).strength(step, num_steps)

    def value_weights(self, certainty: torch.Tensor) -> torch.Tensor:
        """
        Args:
            certainty: (batch, tokens) float32, the largest conditional probability at the place of each drawn token.

        Returns:
            factors (batch, tokens) on their values.
        """
        if self.normalize:
            certainty = certainty / certainty.sum(dim=1, keepdim=True)
        return 1 - certainty


SCHEDULES: dict[str, Callable[[], ScheduleFunction]] = {
    "constant": lambda: constant,
    "linear": lambda: linear,
    "interval": Interval,
    "power_cosine": PowerCosine,
    "soft_cfg": SoftCFG,
}


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, strength: float) -> torch.Tensor:
    """(1 + t) * conditional - t * unconditional: t = 0 leaves the conditional logits as they are."""
    return (1 + strength) * conditional - strength * unconditional


@dataclass
class Guidance:
    """
    Strength of guidance over the steps of a generation.

    Args:
        scale: the number that papers print, in the convention of the family; 0 or above.
        schedule: factor on the strength at each step: a name out of `SCHEDULES`, a dict of that name as `type` and
            its options, one factor per step, or a function of step and number of steps.
        neutral: the scale that means no guidance, as any below it: 0 where the paper's formula is
            (1 + scale) * conditional - scale * unconditional, 1 where it is
            unconditional + scale * (conditional - unconditional). The strength is what `scale` has beyond it.

    Raises:
        ValueError: negative scale, unknown schedule or option.
    """

    scale: float = 0.0
    schedule: GuidanceSchedule = "constant"
    neutral: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"guidance_scale is {self.scale}; it must be 0 (no guidance) or above.")
        self.factor = self._resolve(self.schedule)
        self._strengths: dict[int, list[float]] = {}

    @staticmethod
    def _resolve(schedule: GuidanceSchedule) -> ScheduleFunction | Sequence[float]:
        """The function behind a name or dict; functions and lists as they are."""
        if callable(schedule) or (hasattr(schedule, "__len__") and not isinstance(schedule, str | Mapping)):
            return schedule
        options = dict(schedule) if isinstance(schedule, Mapping) else {"type": schedule}
        name = options.pop("type", None)
        if name not in SCHEDULES:
            raise ValueError(
                f"guidance_schedule is {name!r}; known are {', '.join(sorted(SCHEDULES))}, a list with one "
                "factor per step, or a function of step and number of steps."
            )
        try:
            return SCHEDULES[name](**options)
        except TypeError as error:
            raise ValueError(f"guidance_schedule {name!r} has no option {', '.join(options)}.") from error

    def strength(self, step: int, num_steps: int) -> float:
        """
        Guidance strength at `step`, counted from 0.

        Raises:
            ValueError: the schedule has no factor for this step, or one that is negative or not finite.
        """
        if callable(self.factor):
            factor = self.factor(step, num_steps)
        elif len(self.factor) == num_steps:
            factor = self.factor[step]
        else:
            raise ValueError(
                f"guidance_schedule has {len(self.factor)} factors; this model takes {num_steps} steps."
            )
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"guidance_schedule gives {factor} at step {step}; every factor must be finite, 0 or above."
            )
        return max(self.scale - self.neutral, 0.0) * factor

    def is_off(self, num_steps: int) -> bool:
        """Whether no step is guided, so that unconditional rows need not be computed; checks every step."""
        return not any(self.strengths(num_steps))

    def strengths(self, num_steps: int) -> list[float]:
        """The strength at every step, computed once."""
        if num_steps not in self._strengths:
            self._strengths[num_steps] = [self.strength(step, num_steps) for step in range(num_steps)]
        return self._strengths[num_steps]

    def combiner(self, num_steps: int, device: torch.device) -> "Combiner":
        """What guides the tokens of one request of at most `num_steps` tokens."""
        return Combiner(torch.tensor(self.strengths(num_steps), device=device))


@dataclass
class Combiner:
    """
    Conditional and unconditional logits to guided ones, token by token.

    Args:
        strengths: (num_steps,) float32, the strength at each place of the sequence.
    """

    strengths: torch.Tensor

    @cached_property
    def values(self) -> list[float]:
        """`strengths` on the host."""
        return self.strengths.tolist()

    @cached_property
    def constant(self) -> float | None:
        """The strength, if it is the same everywhere and not 0."""
        values = set(self.values)
        return values.pop() if len(values) == 1 and 0.0 not in values else None

    def at(self, step: int | None) -> float | None:
        """The strength at a place of the sequence; `None` stands for several of them, and for a strength that differs."""
        return self.constant if step is None else self.values[min(step, len(self.values) - 1)]

    def __call__(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, steps: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            conditional, unconditional: logits (batch, n, vocab_size) float32.
            steps: (batch or 1, n) int64, the place in the sequence that each of them predicts.
        """
        if self.constant is not None:
            return torch.add(unconditional, conditional - unconditional, alpha=1 + self.constant)
        return self.at_each(conditional, unconditional, steps)

    def at_each(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, steps: torch.Tensor
    ) -> torch.Tensor:
        """The same, without asking whether the strength is the same everywhere."""
        strength = self.strengths[steps.clamp(max=len(self.strengths) - 1)].unsqueeze(-1)
        guided = unconditional + (1 + strength) * (conditional - unconditional)
        return torch.where(strength == 0, conditional, guided)


@dataclass
class LogProbabilityCombiner:
    """
    The guidance of transformers' language models: as [`Combiner`], on log probabilities instead of logits.

    Args:
        scale: weight of the conditional against the unconditional prediction; 1 is no guidance.
    """

    scale: float

    def at(self, step: int | None) -> float:
        """As of [`Combiner`]: a distribution is the same whether logits or log probabilities are guided."""
        return self.scale - 1

    def __call__(
        self, conditional: torch.Tensor, unconditional: torch.Tensor, steps: torch.Tensor
    ) -> torch.Tensor:
        conditional, unconditional = conditional.log_softmax(dim=-1), unconditional.log_softmax(dim=-1)
        return self.scale * (conditional - unconditional) + unconditional


@dataclass
class PairedLogits:
    """
    Logits that may still have to be guided, so that a kernel can guide, warp and draw in one pass.

    Args:
        logits: (rows, ..., vocab_size), float32 or the dtype of the model; conditional rows, then as many unconditional ones.
            Without `combine` (batch, ..., vocab_size), with nothing left to do.
        combine: guides conditional and unconditional logits, float32.
        strength: of what `combine` does, in the convention of [`guide`]; `None` if one number does not say it.
    """

    logits: torch.Tensor
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    strength: float | None = 0.0

    def halves(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Conditional and unconditional logits, (batch, ..., vocab_size) each; no others where they have no weight."""
        if self.combine is None:
            return self.logits, None
        conditional, unconditional = self.logits.chunk(2)
        return conditional, None if self.strength == 0 else unconditional

    def guided(self) -> torch.Tensor:
        """(batch, ..., vocab_size) float32."""
        logits = self.logits.float()
        return logits if self.combine is None else self.combine(*logits.chunk(2))
