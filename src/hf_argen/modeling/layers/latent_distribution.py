"""What variational autoencoders encode a picture to."""

from dataclasses import dataclass

import torch

from ...generation import sampling
from ...generation.sampling import Generators

LOWEST_LOG_VARIANCE, HIGHEST_LOG_VARIANCE = -30.0, 20.0


@dataclass
class LatentDistribution:
    """
    Independent normal distributions.

    Attributes:
        mean, log_variance: (batch, ...), not scaled.
    """

    mean: torch.Tensor
    log_variance: torch.Tensor

    @classmethod
    def from_moments(cls, moments: torch.Tensor) -> "LatentDistribution":
        """Of means and log variances one after another in the channels (batch, 2 * channels, ...), these limited."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return cls(mean, log_variance.clamp(LOWEST_LOG_VARIANCE, HIGHEST_LOG_VARIANCE))

    def sample(self, generator: Generators = None) -> torch.Tensor:
        """One draw, shape of `mean`."""
        noise = sampling.normal(self.mean.shape, generator, self.mean.device)
        return self.mean + (0.5 * self.log_variance).exp() * noise.to(self.mean.dtype)

    def divergence(self) -> torch.Tensor:
        """Kullback-Leibler divergence from the standard normal distribution, in nats, summed for each picture: (batch,)."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.flatten(1).sum(dim=1)
