"""Flow head: a token is drawn by following a learned velocity from noise (flow matching, arXiv 2210.02747)."""

from typing import Any

import torch

from ...generation.sampling import Generators
from .adaln_mlp import AdaLNMLP
from .continuous import ContinuousHead, check_sizes, per_row

TIME_SCALE = 1000.0  # what the embedding of a time in [0, 1] is made for
SOLVERS = ("euler", "midpoint", "heun")


class FlowHead(ContinuousHead):
    """
    The network predicts the velocity, token minus noise, on the straight line from noise at time 0 to a token at time 1.

    Args:
        token_size, hidden_size, batch_multiplier: see [`ContinuousHead`].
        width, depth: of the network.
        num_sampling_steps: steps from noise to token.
        solver: "euler" runs the network once a step, "midpoint" and "heun" twice, with an error of second order.
    """

    head_type = "flow"

    def __init__(
        self,
        token_size: int,
        hidden_size: int,
        width: int = 1024,
        depth: int = 6,
        num_sampling_steps: int = 25,
        solver: str = "euler",
        batch_multiplier: int = 4,
    ):
        super().__init__(token_size, hidden_size, batch_multiplier)
        check_sizes(self.head_type, width=width, depth=depth, num_sampling_steps=num_sampling_steps)
        self.check_solver(solver)
        self.num_sampling_steps = num_sampling_steps
        self.solver = solver
        self.net = AdaLNMLP(token_size, token_size, hidden_size, width, depth)

    def init_weights(self) -> None:
        self.net.init_weights()

    @staticmethod
    def check_solver(solver: str) -> None:
        """Refuses an unknown solver."""
        if solver not in SOLVERS:
            raise ValueError(f"solver is {solver!r}; known are {', '.join(SOLVERS)}.")

    # Training

    def token_losses(
        self, target: torch.Tensor, hidden: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        """Squared error of the velocity at a random time, mean over channels and repetitions, (batch, n)."""
        batch, n, _ = target.shape
        times, noise = self.draw_times_and_noise(target, generator)
        tiled = target.expand(self.batch_multiplier, -1, -1, -1).flatten(0, 2)
        condition = self.net.embed_condition(hidden).expand(self.batch_multiplier, -1, -1, -1).flatten(0, 2)
        times, noise = times.flatten(), noise.flatten(0, 2)
        noisy = noise + times[:, None] * (tiled - noise)
        velocity = self.net(noisy, self.net.embed_times(times * TIME_SCALE), condition)
        losses = (tiled - noise - velocity).square().mean(dim=-1)
        return losses.view(self.batch_multiplier, batch, n).mean(dim=0)

    def draw_times_and_noise(
        self, target: torch.Tensor, generator: Generators
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Times (repetitions, batch, n) in [0, 1) and noise of the repeated target."""
        batch, n, channels = target.shape

        def draw_times(leading: tuple[int, int], one: torch.Generator | None) -> torch.Tensor:
            return torch.rand(*leading, n, generator=one, device=target.device)

        def draw_noise(leading: tuple[int, int], one: torch.Generator | None) -> torch.Tensor:
            return torch.randn(*leading, n, channels, generator=one, device=target.device)

        times = per_row(draw_times, batch, self.batch_multiplier, generator)
        return times, per_row(draw_noise, batch, self.batch_multiplier, generator)

    # Generation

    @classmethod
    def sample_options(cls) -> set[str]:
        return {"num_steps", "solver"}

    @property
    def sampling_steps(self) -> int:
        """How many steps are taken where none are named."""
        return self.num_sampling_steps

    def check_num_steps(self, num_steps: int) -> None:
        check_sizes(self.head_type, num_steps=num_steps)

    def draw(
        self,
        hidden: torch.Tensor,
        guidance: float | torch.Tensor | None,
        temperature: float,
        generator: Generators,
        do_sample: bool,
        num_steps: int | None = None,
        solver: str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """
        The temperature scales the noise that a token starts from; all else is determined by it.

        Args:
            num_steps, solver: in place of the head's own.
        """
        steps = self.num_sampling_steps if num_steps is None else num_steps
        self.check_num_steps(steps)
        solver = self.solver if solver is None else solver
        self.check_solver(solver)
        batch, n = len(hidden) // (1 if guidance is None else 2), hidden.shape[1]
        noise = self.normal((batch, n, self.token_size), hidden, generator, do_sample) * temperature
        condition = self.net.embed_condition(hidden).flatten(0, 1)
        self.calls += steps if solver == "euler" else 2 * steps
        tokens = self.follow(noise.flatten(0, 1), condition, guidance, steps, solver)
        return tokens.view(batch, n, self.token_size)

    def follow(
        self,
        tokens: torch.Tensor,
        condition: torch.Tensor,
        guidance: float | torch.Tensor | None,
        steps: int,
        solver: str,
    ) -> torch.Tensor:
        """From noise (rows, token_size) to tokens, without anything in between that waits for the device."""
        grid = torch.arange(2 * steps + 1, device=tokens.device) / (
            2 * steps
        )  # times of steps and their middles
        times = self.net.embed_times(grid * TIME_SCALE)
        length = 1 / steps
        for step in range(steps):
            first, middle, last = (times[i : i + 1] for i in range(2 * step, 2 * step + 3))
            velocity = self.velocity(tokens, first, condition, guidance)
            if solver == "midpoint":
                velocity = self.velocity(tokens + length / 2 * velocity, middle, condition, guidance)
            elif solver == "heun":
                ahead = self.velocity(tokens + length * velocity, last, condition, guidance)
                velocity = (velocity + ahead) / 2
            tokens = tokens + length * velocity
        return tokens

    def velocity(
        self,
        tokens: torch.Tensor,
        times: torch.Tensor,
        condition: torch.Tensor,
        guidance: float | torch.Tensor | None,
    ) -> torch.Tensor:
        """Guided velocity of tokens (rows, token_size) at one embedded time."""
        velocity = self.net(tokens, times, condition)
        if guidance is None:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + guidance * (conditional - unconditional)
