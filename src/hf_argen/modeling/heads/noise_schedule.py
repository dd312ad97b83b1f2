"""
The Gaussian diffusion process of diffusion heads (arXiv 2006.11239, with the cosine schedule and the learned variance of
arXiv 2102.09672), and the choice of fewer steps out of it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

TRAINING_STEPS = 1000
LARGEST_BETA = 0.999


def respaced(num_steps: int | str, training_steps: int = TRAINING_STEPS) -> list[int]:
    """
    The steps of the training process that generation takes, in rising order.

    Args:
        num_steps: how many, evenly spaced from first to last; or in the authors' notation "a,b,...", so many in each of
            equal sections, or "ddimN", N of them with a whole-number stride from 0 (arXiv 2010.02502).
        training_steps: of the whole process.

    Raises:
        ValueError: not so written, or more than there are.
    """
    text = str(num_steps)
    if text.startswith("ddim") and text[4:].isdigit():
        for stride in range(1, training_steps):
            steps = list(range(0, training_steps, stride))
            if len(steps) == int(text[4:]):
                return steps
        raise ValueError(f"num_sampling_steps is {text!r}; no whole-number stride gives so many steps.")
    sections = text.split(",")
    if not all(section.strip().isdigit() and int(section) > 0 for section in sections):
        raise ValueError(
            f"num_sampling_steps is {num_steps!r}; give a whole number above 0, 'a,b,...' of them, or 'ddimN'."
        )
    steps, start = [], 0
    for i, count in enumerate(map(int, sections)):
        size = training_steps // len(sections) + (i < training_steps % len(sections))
        if count > size:
            raise ValueError(
                f"num_sampling_steps is {num_steps!r}; a training of {training_steps} steps has {size} for {count} of them."
            )
        stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):  # summed up, not multiplied: halves round the authors' way
            steps.append(start + round(place))
            place += stride
        start += size
    return steps


def respaced_as(own: int | str, num_steps: int | str | None = None) -> list[int]:
    """
    As [`respaced`], the steps of a head whose own are `own`: these, or as many as `num_steps` says. Where its own have a
    stride, which leaves out the end of the process, a number of others goes evenly from where they begin; text stands as it is.
    """
    if num_steps is None:
        return respaced(own)
    if isinstance(num_steps, int) and str(own).startswith("ddim"):
        return respaced(num_steps, respaced(own)[-1] + 1)
    return respaced(num_steps)


@dataclass(frozen=True)
class NoiseSchedule:
    """
    The constants of a process, one per step, float32 of float64 results.

    Attributes:
        timesteps: (steps,) int64, which steps of the training process these are.
        signal, noise: (steps,), what remains of a token and how much noise is added on the way to a step.
        betas, alphas_cumprod: (steps,), variance that a step adds, and share of the token's that is left after it.
        recip, recipm1: (steps,), of noisy token and noise in the prediction of the token.
        of_token, of_noisy: (steps,), of predicted and noisy token in the mean of the step back.
        least_log_variance, most_log_variance: (steps,), between which the network chooses.
    """

    timesteps: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    recip: torch.Tensor
    recipm1: torch.Tensor
    of_token: torch.Tensor
    of_noisy: torch.Tensor
    least_log_variance: torch.Tensor
    most_log_variance: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def cosine_betas(steps: int = TRAINING_STEPS) -> np.ndarray:
    """Variances (steps,) float64 that leave cos^2 of the way to a quarter turn (arXiv 2102.09672)."""

    def share_left(progress: float) -> float:
        return math.cos((progress + 0.008) / 1.008 * math.pi / 2) ** 2

    left = [share_left(i / steps) for i in range(steps + 1)]
    return np.array([min(1 - after / before, LARGEST_BETA) for before, after in pairwise(left)])


@torch.compiler.disable  # type: ignore[untyped-decorator]
@lru_cache(maxsize=256)
def noise_schedule(own: int | str, device: torch.device, num_steps: int | str | None = None) -> NoiseSchedule:
    """
    The process of so many steps.

    Args:
        own, num_steps: see [`respaced_as`].
        device: of the constants.
    """
    kept = respaced_as(own, num_steps)
    left = np.cumprod(1.0 - cosine_betas())[kept]
    left_before = np.append(1.0, left[:-1])
    betas = 1 - left / left_before
    # Once more from the variances, as the authors do: the last digits go into the constants of the first steps back.
    left = np.cumprod(1.0 - betas)
    left_before = np.append(1.0, left[:-1])
    variance = betas * (1.0 - left_before) / (1.0 - left)
    second = variance[1] if len(variance) > 1 else betas[0]  # the first is 0, which has no logarithm
    tables = {
        "signal": np.sqrt(left),
        "noise": np.sqrt(1.0 - left),
        "betas": betas,
        "alphas_cumprod": left,
        "recip": np.sqrt(1.0 / left),
        "recipm1": np.sqrt(1.0 / left - 1),
        "of_token": betas * np.sqrt(left_before) / (1.0 - left),
        "of_noisy": (1.0 - left_before) * np.sqrt(1.0 - betas) / (1.0 - left),
        "least_log_variance": np.log(np.append(second, variance[1:])),
        "most_log_variance": np.log(betas),
    }
    with torch.inference_mode(False):
        return NoiseSchedule(
            timesteps=torch.tensor(kept, device=device),
            **{name: torch.from_numpy(table).float().to(device) for name, table in tables.items()},
        )


def step_back(
    process: NoiseSchedule,
    step: int | torch.Tensor,
    noisy: torch.Tensor,
    predicted: torch.Tensor,
    variance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The distribution of tokens one step back.

    Args:
        step: number of the step, one for all or (rows, 1).
        noisy: (rows, channels) at that step.
        predicted: the noise in them.
        variance: -1 for the least, 1 for the most log variance; not limited.

    Returns:
        mean, log variance, and the predicted tokens without noise.
    """
    share = (variance + 1) / 2
    log_variance = share * process.most_log_variance[step] + (1 - share) * process.least_log_variance[step]
    tokens = process.recip[step] * noisy - process.recipm1[step] * predicted
    mean = process.of_token[step] * tokens + process.of_noisy[step] * noisy
    return mean, log_variance, tokens
