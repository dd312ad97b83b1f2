"""Shortcut head: a flow whose steps can be long (FAR, arXiv 2504.18391; shortcut models, arXiv 2410.12557)."""

import torch

from ...generation.sampling import Generators
from .adaln_mlp import AdaLNMLP
from .continuous import check_sizes, per_row
from .flow import TIME_SCALE, FlowHead

CONSISTENT_SHARE = 4  # of so many repetitions, one is trained to agree with two shorter steps


class ShortcutHead(FlowHead):
    """
    As the flow head, but the network is also told how long the step is, and learns the mean velocity over it: a step of any
    length must lead where two of half that length lead.

    Args:
        token_size, hidden_size: see [`ContinuousHead`].
        width, depth: of the network.
        num_sampling_steps: steps from noise to token, a power of two.
        finest_steps: a power of two; steps so short are taken for the velocity itself.
        batch_multiplier: at least 2; a quarter of the repetitions, at least one, trains the agreement.
    """

    head_type = "shortcut"

    def __init__(
        self,
        token_size: int,
        hidden_size: int,
        width: int = 1024,
        depth: int = 6,
        num_sampling_steps: int = 4,
        finest_steps: int = 128,
        batch_multiplier: int = 4,
    ):
        super().__init__(
            token_size, hidden_size, width, depth, num_sampling_steps, batch_multiplier=batch_multiplier
        )
        check_sizes(self.head_type, finest_steps=finest_steps)
        if finest_steps < 2 or finest_steps & (finest_steps - 1):
            raise ValueError(f"finest_steps is {finest_steps}; it must be a power of two, 2 at least.")
        if batch_multiplier < 2:
            raise ValueError(
                f"batch_multiplier is {batch_multiplier}; a shortcut head needs 2 at least, one to agree."
            )
        self.finest_steps = finest_steps
        self.check_num_steps(num_sampling_steps)
        self.net = AdaLNMLP(token_size, token_size, hidden_size, width, depth, num_times=2)

    @property
    def finest_level(self) -> int:
        """Level of the finest steps; at level k a step is 2 ** -k long."""
        return self.finest_steps.bit_length() - 1

    @classmethod
    def sample_options(cls) -> set[str]:
        return {"num_steps"}

    def check_num_steps(self, num_steps: int) -> None:
        """Refuses numbers of steps that training has not seen."""
        super().check_num_steps(num_steps)
        if num_steps & (num_steps - 1) or num_steps > self.finest_steps:
            raise ValueError(
                f"num_steps is {num_steps}; a shortcut head takes powers of two up to {self.finest_steps}."
            )

    def nearest_num_steps(self, num_steps: int) -> int:
        return min(1 << (num_steps.bit_length() - 1), self.finest_steps)

    def embed(self, times: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Times (n,) in [0, 1] and levels of step lengths (n,), embedded."""
        return self.net.embed_times(times * TIME_SCALE, levels)

    def token_losses(
        self, target: torch.Tensor, hidden: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        """Squared error of the velocity or, in the last repetitions, of agreement with two shorter steps, (batch, n)."""
        batch, n, _ = target.shape
        times, noise = self.draw_times_and_noise(target, generator)
        levels = self.draw_levels(target, generator)
        agreeing = max(1, self.batch_multiplier // CONSISTENT_SHARE)
        plain = self.batch_multiplier - agreeing
        condition = self.net.embed_condition(hidden)
        condition = condition.expand(self.batch_multiplier, -1, -1, -1)
        straight = target - noise
        # Long steps start where a number of them from noise may lead.
        coarse = 2.0 ** levels[plain:]
        times = torch.cat([times[:plain], (times[plain:] * coarse).floor() / coarse])
        levels = torch.cat([torch.full_like(levels[:plain], self.finest_level), levels[plain:]])
        noisy = noise + times.unsqueeze(-1) * straight
        wanted = torch.cat(
            [
                straight[:plain],
                self.two_steps(noisy[plain:], times[plain:], levels[plain:], condition[plain:]),
            ]
        )
        found = self.net(
            noisy.flatten(0, 2), self.embed(times.flatten(), levels.flatten()), condition.flatten(0, 2)
        )
        losses = (wanted.flatten(0, 2) - found).square().mean(dim=-1)
        return losses.view(self.batch_multiplier, batch, n).mean(dim=0)

    def draw_levels(self, target: torch.Tensor, generator: Generators) -> torch.Tensor:
        """Levels (repetitions, batch, n) of steps that are to agree with two shorter ones."""
        batch, n, _ = target.shape

        def draw(leading: tuple[int, int], one: torch.Generator | None) -> torch.Tensor:
            return torch.randint(self.finest_level, (*leading, n), generator=one, device=target.device)

        return per_row(draw, batch, self.batch_multiplier, generator)

    @torch.no_grad()
    def two_steps(
        self, noisy: torch.Tensor, times: torch.Tensor, levels: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """Mean velocity of two steps of half the length, shape of `noisy` (..., token_size)."""
        shape = noisy.shape
        noisy, condition = noisy.flatten(0, -2), condition.flatten(0, -2)
        times, finer = times.flatten(), levels.flatten() + 1
        length = 0.5 ** finer.float()
        first = self.net(noisy, self.embed(times, finer), condition)
        ahead = noisy + length[:, None] * first
        second = self.net(ahead, self.embed(times + length, finer), condition)
        return ((first + second) / 2).view(shape)

    def follow(
        self,
        tokens: torch.Tensor,
        condition: torch.Tensor,
        guidance: float | torch.Tensor | None,
        steps: int,
        solver: str,
    ) -> torch.Tensor:
        grid = torch.arange(steps, device=tokens.device) / steps
        levels = torch.full_like(grid, steps.bit_length() - 1)
        times = self.embed(grid, levels)
        for step in range(steps):
            tokens = tokens + self.velocity(tokens, times[step : step + 1], condition, guidance) / steps
        return tokens
