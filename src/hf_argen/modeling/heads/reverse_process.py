"""The way back from noise to tokens as a chain of normal distributions, whose densities tell a draft's worth (2411.11925)."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .adaln_mlp import AdaLNMLP
from .noise_schedule import NoiseSchedule, step_back


class HasNetwork(Protocol):
    """A head of which a process counts the calls."""

    net: AdaLNMLP
    calls: int


def guided_step_back(
    net: AdaLNMLP,
    process: NoiseSchedule,
    step: int | torch.Tensor,
    noisy: torch.Tensor,
    times: torch.Tensor,
    condition: torch.Tensor,
    guidance: float | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and log variance (rows, token_size) of the tokens after a step back.

    Args:
        process: its constants.
        step: one, or one for each row (rows, 1).
        noisy: (rows, token_size).
        times: (1 or rows of the condition, width) embedded.
        condition: (rows, width) embedded; with guidance (2 * rows, width), conditional ones first.
        guidance: weight of the conditional prediction, or (rows, 1).
    """
    predicted, variance = net(noisy, times, condition).chunk(2, dim=-1)
    if guidance is not None:
        conditional, unconditional = predicted.chunk(2)
        predicted = unconditional + guidance * (conditional - unconditional)
        variance = variance[: len(noisy)]
    return step_back(process, step, noisy, predicted, variance)[:2]


@dataclass(frozen=True)
class ReverseProcess:
    """
    The steps back of a diffusion head for some places, given their hidden states. Every step, the last one included, adds
    noise, so that each is a normal distribution and a path through them has a density. (`DiffusionHead.sample` leaves the
    noise of the last step out.)

    Attributes:
        head: the head, whose network is run.
        constants: of the steps.
        times: (steps, width) embedded.
        condition: (rows, width) embedded; with guidance (2 * rows, width), conditional ones first.
        guidance: weight of the conditional prediction, or (rows, 1); `None` without.
        temperature: factor of the noise of all steps.
    """

    head: HasNetwork
    constants: NoiseSchedule
    times: torch.Tensor
    condition: torch.Tensor
    guidance: float | torch.Tensor | None
    temperature: float

    def __len__(self) -> int:
        return len(self.constants)

    @property
    def rows(self) -> int:
        """How many tokens it leads to."""
        return len(self.condition) // (1 if self.guidance is None else 2)

    def select(self, rows: torch.Tensor) -> "ReverseProcess":
        """That of some of the rows, which may repeat; `rows` (n,) int64."""
        both = rows if self.guidance is None else torch.cat([rows, rows + self.rows])
        guidance = self.guidance[rows] if isinstance(self.guidance, torch.Tensor) else self.guidance
        return replace(self, condition=self.condition[both], guidance=guidance)

    def transition(self, noisy: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (rows, token_size) of what follows noisy tokens of that shape."""
        self.head.calls += 1
        mean, log_variance = guided_step_back(
            self.head.net,
            self.constants,
            step,
            noisy,
            self.times[step : step + 1],
            self.condition,
            self.guidance,
        )
        return mean, torch.exp(0.5 * log_variance) * self.temperature

    def walk(
        self, noisy: torch.Tensor, noises: torch.Tensor, last: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Goes so many steps as there is noise for, down to `last`.

        Args:
            noisy: (rows, token_size), where the path begins.
            noises: (n, rows, token_size) standard normal, in the order of the steps.
            last: 0 leads to the tokens.

        Returns:
            path (n + 1, rows, token_size), from `noisy` on, and its log density (rows,) float64.
        """
        path, density = [noisy], torch.zeros(len(noisy), dtype=torch.double, device=noisy.device)
        for step, noise in zip(reversed(range(last, last + len(noises))), noises, strict=True):
            mean, deviation = self.transition(path[-1], step)
            path.append(mean + deviation * noise)
            density = density + log_normal(noise, deviation)
        return torch.stack(path), density

    def log_density(self, path: torch.Tensor) -> torch.Tensor:
        """
        Of a path through the last n steps to tokens, given where it begins; all steps in one run of the network.

        Args:
            path: (n + 1, rows, token_size), as `walk` gives it.

        Returns:
            (rows,) float64.
        """
        count, rows = len(path) - 1, path.shape[1]
        steps = torch.arange(count - 1, -1, -1, device=path.device)
        each = torch.arange(rows, device=path.device).repeat(count)
        whole = self.select(each)
        times = self.times[steps].repeat_interleave(rows, dim=0)
        self.head.calls += 1
        mean, log_variance = guided_step_back(
            self.head.net,
            self.constants,
            steps.repeat_interleave(rows)[:, None],
            path[:-1].flatten(0, 1),
            times if self.guidance is None else times.repeat(2, 1),
            whole.condition,
            whole.guidance,
        )
        deviation = torch.exp(0.5 * log_variance) * self.temperature
        noise = (path[1:].flatten(0, 1) - mean) / deviation
        return log_normal(noise, deviation).view(count, rows).sum(dim=0)


def log_normal(noise: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Log density (rows,) float64 of mean + deviation * noise, both (rows, token_size), but for the constant part."""
    return (-0.5 * noise.double().square() - deviation.double().log()).sum(dim=-1)
