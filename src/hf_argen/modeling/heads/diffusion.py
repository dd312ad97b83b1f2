"""Diffusion head: a token is drawn by a small network that takes noise away step by step (MAR, arXiv 2406.11838)."""

import math
from typing import Any

import torch

from ...generation.sampling import Generators
from .adaln_mlp import AdaLNMLP
from .continuous import ContinuousHead, check_sizes, per_row
from .noise_schedule import TRAINING_STEPS, NoiseSchedule, noise_schedule, respaced, respaced_as, step_back
from .reverse_process import ReverseProcess, guided_step_back

HALF_STEP = 1 / 255  # of the brightness scale for which the likelihood of the first step was made
LEAST_PROBABILITY = 1e-12


class DiffusionHead(ContinuousHead):
    """
    Denoising diffusion with a learned variance. The network predicts the noise in a token and where between its bounds the
    log variance of the step back lies.

    Args:
        token_size, hidden_size, batch_multiplier: see [`ContinuousHead`].
        width, depth: of the network.
        num_sampling_steps: steps back in generation, at most 1000; see [`respaced`] for the forms it takes. "ddimN" leaves out
            the last training step, from which the way back multiplies errors by several hundred: take it for small heads and
            short trainings.
    """

    head_type = "diffusion"

    def __init__(
        self,
        token_size: int,
        hidden_size: int,
        width: int = 1024,
        depth: int = 6,
        num_sampling_steps: int | str = 100,
        batch_multiplier: int = 4,
    ):
        super().__init__(token_size, hidden_size, batch_multiplier)
        check_sizes(self.head_type, width=width, depth=depth)
        respaced(num_sampling_steps)
        self.num_sampling_steps = num_sampling_steps
        self.net = AdaLNMLP(token_size, 2 * token_size, hidden_size, width, depth)

    def init_weights(self) -> None:
        self.net.init_weights()

    # Training

    def token_losses(
        self,
        target: torch.Tensor,
        hidden: torch.Tensor,
        generator: Generators = None,
        timesteps: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Squared error of the noise plus, in bits, the variational bound, in which the predicted noise stands still; means
        over channels and repetitions.

        Args:
            target, hidden, generator: see [`ContinuousHead`].
            timesteps: (batch_multiplier, batch, n) int64 in [0, 1000); drawn by default.
            noise: (batch_multiplier, batch, n, token_size); drawn by default.

        Returns:
            (batch, n) float32.
        """
        batch, n, channels = target.shape
        device = target.device

        def draw_steps(leading: tuple[int, int], one: torch.Generator | None) -> torch.Tensor:
            return torch.randint(TRAINING_STEPS, (*leading, n), generator=one, device=device)

        def draw_noise(leading: tuple[int, int], one: torch.Generator | None) -> torch.Tensor:
            return torch.randn(*leading, n, channels, generator=one, device=device)

        if timesteps is None:
            timesteps = per_row(draw_steps, batch, self.batch_multiplier, generator)
        if noise is None:
            noise = per_row(draw_noise, batch, self.batch_multiplier, generator)
        repeated = len(timesteps)
        tiled = target.expand(repeated, -1, -1, -1).flatten(0, 2)
        condition = self.net.embed_condition(hidden).expand(repeated, -1, -1, -1).flatten(0, 2)
        losses = self.row_losses(tiled, condition, timesteps.flatten(), noise.flatten(0, 2))
        return losses.view(repeated, batch, n).mean(dim=0)

    def row_losses(
        self, target: torch.Tensor, condition: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Losses (rows,) of tokens and noise (rows, token_size) at timesteps (rows,), given embedded conditions."""
        process = noise_schedule(TRAINING_STEPS, target.device)
        noisy = process.signal[timesteps, None] * target + process.noise[timesteps, None] * noise
        answer = self.net(noisy, self.net.embed_times(timesteps), condition)
        predicted, variance = answer.chunk(2, dim=-1)
        mean, log_variance, _ = step_back(process, timesteps[:, None], noisy, predicted.detach(), variance)
        true_mean = process.of_token[timesteps, None] * target + process.of_noisy[timesteps, None] * noisy
        true_log_variance = process.least_log_variance[timesteps, None]
        bound = normal_divergence(true_mean, true_log_variance, mean, log_variance)
        first = -discretized_log_likelihood(target, mean, 0.5 * log_variance)
        bits = torch.where(timesteps == 0, first.mean(dim=-1), bound.mean(dim=-1)) / math.log(2)
        return (noise - predicted).square().mean(dim=-1) + bits

    # Generation

    @classmethod
    def sample_options(cls) -> set[str]:
        return {"num_steps"}

    @property
    def sampling_steps(self) -> int:
        """How many steps `num_sampling_steps` are."""
        return len(respaced(self.num_sampling_steps))

    @property
    def telling_steps(self) -> int:
        """
        How many of its last steps tell by their densities whether two heads lead to the same tokens: all, but half of those
        that begin at the end of the training process, where the first one multiplies errors by several hundred.
        """
        steps = respaced(self.num_sampling_steps)
        return len(steps) if steps[-1] < TRAINING_STEPS - 1 else -(-len(steps) // 2)

    def check_num_steps(self, num_steps: int) -> None:
        respaced_as(self.num_sampling_steps, num_steps)

    def draw(
        self,
        hidden: torch.Tensor,
        guidance: float | torch.Tensor | None,
        temperature: float,
        generator: Generators,
        do_sample: bool,
        num_steps: int | str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """
        The start noise is not scaled by the temperature, what is added at each step is.

        Args:
            num_steps: in place of `num_sampling_steps`, see [`respaced_as`].
        """
        process = noise_schedule(self.num_sampling_steps, hidden.device, num_steps)
        batch, n = len(hidden) // (1 if guidance is None else 2), hidden.shape[1]
        shape = (batch, n, self.token_size)
        start = self.normal(shape, hidden, generator, do_sample)
        # The authors draw for unconditional rows, too, whose noise then goes unused.
        whole = shape if isinstance(generator, list | tuple) else (len(hidden), n, self.token_size)
        noises = [
            self.normal(whole, hidden, generator, do_sample)[:batch].flatten(0, 1)
            for _ in range(len(process))
        ]
        self.calls += len(process)
        times = self.net.embed_times(process.timesteps)
        condition = self.net.embed_condition(hidden).flatten(0, 1)
        tokens = self.denoise(process, start.flatten(0, 1), times, condition, noises, guidance, temperature)
        return tokens.view(shape)

    def denoise(
        self,
        process: NoiseSchedule,
        tokens: torch.Tensor,
        times: torch.Tensor,
        condition: torch.Tensor,
        noises: list[torch.Tensor],
        guidance: float | torch.Tensor | None,
        temperature: float,
    ) -> torch.Tensor:
        """
        All steps back, without anything in between that waits for the device.

        Args:
            process: the steps.
            tokens: (rows, token_size) pure noise.
            times: (steps, width) embedded.
            condition: (rows, width) embedded; with guidance (2 * rows, width), conditional ones first.
            noises: (rows, token_size) for each step, in the order of their use.
        """
        for step, noise in zip(reversed(range(len(noises))), noises, strict=True):
            mean, log_variance = guided_step_back(
                self.net, process, step, tokens, times[step : step + 1], condition, guidance
            )
            tokens = mean if step == 0 else mean + torch.exp(0.5 * log_variance) * noise * temperature
        return tokens

    def reverse_process(
        self,
        hidden: torch.Tensor,
        guidance: float | torch.Tensor | None = None,
        temperature: float = 1.0,
        num_steps: int | str | None = None,
    ) -> ReverseProcess:
        """
        The steps from noise to a token for each hidden state, with their densities.

        Args:
            hidden, guidance, temperature: see `sample`.
            num_steps: in place of `num_sampling_steps`, see [`respaced_as`].

        Returns:
            a process of batch * n rows.

        Raises:
            ValueError: as `sample`.
        """
        guidance = self.checked_guidance(hidden, guidance, temperature)
        process = noise_schedule(self.num_sampling_steps, hidden.device, num_steps)
        times = self.net.embed_times(process.timesteps)
        condition = self.net.embed_condition(hidden).flatten(0, 1)
        return ReverseProcess(self, process, times, condition, guidance, temperature)


def normal_divergence(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """Kullback-Leibler divergence of the second normal distribution from the first, element by element, in nats."""
    ratio = torch.exp(log_variance - other_log_variance)
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (-1.0 + other_log_variance - log_variance + ratio + distance)


def discretized_log_likelihood(
    tokens: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor
) -> torch.Tensor:
    """Log probability of the interval of width 2/255 around each value, the outermost ones open (arXiv 2006.11239)."""
    centred, precision = tokens - mean, torch.exp(-log_scale)
    upper = normal_cdf(precision * (centred + HALF_STEP))
    lower = normal_cdf(precision * (centred - HALF_STEP))
    between = (upper - lower).clamp(min=LEAST_PROBABILITY).log()
    above = (1.0 - lower).clamp(min=LEAST_PROBABILITY).log()
    below = upper.clamp(min=LEAST_PROBABILITY).log()
    return torch.where(tokens < -0.999, below, torch.where(tokens > 0.999, above, between))


def normal_cdf(values: torch.Tensor) -> torch.Tensor:
    """The normal distribution function by the approximation that the authors train with."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (values + 0.044715 * values.pow(3))))
