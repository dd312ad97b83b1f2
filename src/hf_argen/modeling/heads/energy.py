"""Energy head: a token is made from noise in one pass, trained by the energy score (EAR, arXiv 2505.07812)."""

from numbers import Real
from typing import Any

import torch

from ...generation import sampling
from ...generation.sampling import Generators
from .adaln_mlp import AdaLNMLP
from .continuous import ContinuousHead, check_sizes, per_row


class EnergyHead(ContinuousHead):
    """
    The network turns a hidden state and uniform noise into a token. The energy score, which the true distribution alone
    minimises, compares two such tokens with the wanted one and with each other; no density is needed.

    Args:
        token_size, hidden_size, batch_multiplier: see [`ContinuousHead`].
        width, depth: of the network.
        noise_size: channels of the noise.
        exponent: of distances, in (0, 2).
        diversity_weight: of the distance between the two tokens; 1 is the score, a little below it sharpens.
    """

    head_type = "energy"

    def __init__(
        self,
        token_size: int,
        hidden_size: int,
        width: int = 1024,
        depth: int = 6,
        noise_size: int = 64,
        exponent: float = 1.0,
        diversity_weight: float = 1.0,
        batch_multiplier: int = 1,
    ):
        super().__init__(token_size, hidden_size, batch_multiplier)
        check_sizes(self.head_type, width=width, depth=depth, noise_size=noise_size)
        for name, value, most in (("exponent", exponent, 2), ("diversity_weight", diversity_weight, None)):
            if not isinstance(value, Real) or not value > 0 or (most is not None and value >= most):
                raise ValueError(
                    f"{name} of the energy head is {value!r}; it must lie in (0, {most or 'inf'})."
                )
        self.noise_size = noise_size
        self.exponent = float(exponent)
        self.diversity_weight = float(diversity_weight)
        self.net = AdaLNMLP(hidden_size, token_size, noise_size, width, depth, num_times=0)

    def init_weights(self) -> None:
        self.net.init_weights()

    def token_losses(
        self, target: torch.Tensor, hidden: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        """Negative energy score, mean over repetitions, (batch, n)."""
        batch, n, channels = target.shape
        repeated = self.batch_multiplier

        def draw(leading: tuple[int, int], one: torch.Generator | None) -> torch.Tensor:
            return torch.rand(*leading, n, self.noise_size, generator=one, device=target.device)

        noise = per_row(draw, batch, 2 * repeated, generator) - 0.5
        made = self.make(hidden.expand(2 * repeated, -1, -1, -1).flatten(0, 2), noise.flatten(0, 2))
        first, second = made.view(2, repeated, batch, n, channels)
        apart = self.distance(first, second)
        losses = self.distance(first, target) + self.distance(second, target) - self.diversity_weight * apart
        return losses.mean(dim=0)

    def make(self, hidden: torch.Tensor, noise: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Tokens (rows, token_size) of hidden states and noise (rows, noise_size)."""
        return self.net(hidden, None, self.net.embed_condition(noise), temperature)

    def distance(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Euclidean distance of tokens (..., token_size), to the head's exponent."""
        distance = torch.linalg.vector_norm(first - second, dim=-1)
        return distance if self.exponent == 1.0 else distance.pow(self.exponent)

    def draw(
        self,
        hidden: torch.Tensor,
        guidance: float | torch.Tensor | None,
        temperature: float,
        generator: Generators,
        do_sample: bool,
        **options: Any,
    ) -> torch.Tensor:
        """The temperature scales how far the noise shifts the blocks; guidance works on the hidden states."""
        batch, n = len(hidden) // (1 if guidance is None else 2), hidden.shape[1]
        hidden = hidden.flatten(0, 1).float()
        if guidance is not None:
            conditional, unconditional = hidden.chunk(2)
            hidden = guidance * conditional + (1 - guidance) * unconditional
        noise = torch.zeros(batch, n, self.noise_size, device=hidden.device)
        if do_sample:
            noise = sampling.rand(noise.shape, generator, hidden.device) - 0.5
        self.calls += 1
        made = self.make(hidden, noise.flatten(0, 1), temperature)
        return made.view(batch, n, self.token_size)
