"""
What masked families draw in training: hidden tokens, dropped conditions, noise (MAR, arXiv 2406.11838; MaskGIT, arXiv
2202.04200).
"""

import math
from typing import Any

import numpy as np
import torch

from ..generation import sampling
from ..generation.sampling import Generators

MASK_RATIO_STD = 0.25  # of the normal distribution around 1 from which the share of hidden tokens is drawn


class MaskedTrainingMixin:
    """For generators whose configuration has `num_image_tokens`, `min_mask_ratio`, `causal` and `condition_dropout`."""

    config: Any

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def draw_mask(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """
        The hidden tokens of each row, (batch_size, tokens) bool, as many in every row: drawn as by the authors, from
        numpy's global generator, orders first. In the causal form all are.
        """
        tokens = self.config.num_image_tokens
        if self.config.causal:
            return torch.ones(batch_size, tokens, dtype=torch.bool, device=device)
        orders = sampling.numpy_permutations(tokens, batch_size, device)
        hidden = math.ceil(tokens * self.draw_mask_ratio())
        mask = torch.zeros(batch_size, tokens, dtype=torch.bool, device=device)
        return mask.scatter(1, orders[:, :hidden], True)

    def draw_mask_ratio(self) -> float:
        """A share of hidden tokens, from a normal distribution around 1 cut off at 1 and at `min_mask_ratio`."""
        lowest = torch.tensor((self.config.min_mask_ratio - 1) / MASK_RATIO_STD, dtype=torch.float64)
        below = torch.special.ndtr(lowest)
        quantile = below + np.random.uniform() * (0.5 - below)
        return 1 + MASK_RATIO_STD * torch.special.ndtri(quantile).item()

    def draw_dropped_conditions(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Rows whose condition is dropped in training, (batch_size,) bool; drawn as by the authors."""
        return torch.rand(batch_size, device=device) < self.config.condition_dropout

    def generators_of(self, seeds: torch.Tensor | None, device: torch.device) -> Generators:
        """A generator for each of the seeds (batch,); `None` without."""
        if seeds is None:
            return None
        return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    def checked_mask(self, mask: torch.Tensor, batch_size: int) -> torch.Tensor:
        """
        A given mask as bool.

        Raises:
            ValueError: another shape, rows that hide unequal numbers of tokens or none; in the causal form, known tokens.
        """
        expected = (batch_size, self.config.num_image_tokens)
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask has the shape {tuple(mask.shape)}; it must be {expected}.")
        mask = mask.bool()
        counts = mask.sum(dim=1)
        if self.config.causal and not bool(mask.all()):
            raise ValueError("A causal model predicts all tokens; leave mask out.")
        if bool((counts != counts[0]).any()) or not bool(counts[0]):
            raise ValueError(
                f"mask hides {counts.tolist()} tokens; it must hide the same number in every row, and one at least."
            )
        return mask


class MaskedIdTrainingMixin(MaskedTrainingMixin):
    """For generators of ids, whose rows may hide unequal numbers of tokens, as those of MaskGIT do."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def draw_mask(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """
        The hidden tokens of each row, (batch_size, tokens) bool, one at least: a share of arccos of a uniform number, over a
        quarter turn; drawn as by TiTok's authors, from torch's global generator, numbers first.
        """
        tokens = self.config.num_image_tokens
        share = torch.acos(torch.rand(batch_size, device=device)) / (math.pi / 2)
        hidden = (tokens * share.clamp(1e-6, 1.0)).round().clamp(min=1)
        ranks = torch.rand(batch_size, tokens, device=device).argsort(dim=-1)
        return ranks < hidden[:, None]

    def checked_mask(self, mask: torch.Tensor, batch_size: int) -> torch.Tensor:
        """
        A given mask as bool.

        Raises:
            ValueError: another shape, or a row that hides nothing.
        """
        expected = (batch_size, self.config.num_image_tokens)
        if tuple(mask.shape) != expected:
            raise ValueError(f"mask has the shape {tuple(mask.shape)}; it must be {expected}.")
        mask = mask.bool()
        counts = mask.sum(dim=1)
        if not bool(counts.all()):
            raise ValueError(f"mask hides {counts.tolist()} tokens; it must hide one at least in every row.")
        return mask
