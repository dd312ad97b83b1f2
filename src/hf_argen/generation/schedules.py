"""How many tokens are still hidden after each step of masked generation (MaskGIT, arXiv 2202.04200)."""

import math
from collections.abc import Callable

MASK_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: math.cos(math.pi / 2 * progress),
    "linear": lambda progress: 1 - progress,
    "arccos": lambda progress: math.acos(progress) / (math.pi / 2),
    "square_root": lambda progress: 1 - math.sqrt(progress),
    "square": lambda progress: 1 - progress**2,
}
"""Share of the tokens that is hidden, from 1 at no progress to 0 at the end."""


def hidden_after_steps(tokens: int, num_steps: int, schedule: str) -> list[int]:
    """
    Tokens that are hidden after each step. Every step but the last predicts at least one and leaves at least one, as long as
    there are any.

    Args:
        tokens: hidden at the start.
        num_steps: at least 1.
        schedule: a name in `MASK_SCHEDULES`.
    """
    share, counts, before = MASK_SCHEDULES[schedule], [], tokens
    for step in range(1, num_steps):
        before = max(min(before, 1), min(before - 1, math.floor(tokens * share(step / num_steps))))
        counts.append(before)
    return [*counts, 0]
