"""The interface of heads whose tokens are continuous vectors."""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from ...generation import sampling
from ...generation.sampling import Generators


class ContinuousHead(nn.Module):
    """
    Models the distribution of a token given the hidden state at its place.

    Args:
        token_size: channels of a token.
        hidden_size: of the hidden states.
        batch_multiplier: how often every token enters the loss, each time with other noise.

    Attributes:
        head_type: its name in the configuration.
        has_confidence: whether `confidence` says how sure the head is of a token.
        calls: times that its network was run so far, over all tokens of a step together.
    """

    head_type: ClassVar[str]
    has_confidence: ClassVar[bool] = False

    def __init__(self, token_size: int, hidden_size: int, batch_multiplier: int = 1):
        super().__init__()
        check_sizes(self.head_type, batch_multiplier=batch_multiplier)
        self.token_size = token_size
        self.hidden_size = hidden_size
        self.batch_multiplier = batch_multiplier
        self.calls = 0

    @abstractmethod
    def init_weights(self) -> None:
        """Gives all weights their values before training."""

    @abstractmethod
    def token_losses(
        self, target: torch.Tensor, hidden: torch.Tensor, generator: Generators = None
    ) -> torch.Tensor:
        """Losses (batch, n) of tokens (batch, n, token_size) given hidden states (batch, n, hidden_size)."""

    @abstractmethod
    def draw(
        self,
        hidden: torch.Tensor,
        guidance: float | torch.Tensor | None,
        temperature: float,
        generator: Generators,
        do_sample: bool,
        **options: Any,
    ) -> torch.Tensor:
        """See `sample`; the arguments are checked, guidance of several rows is (batch * n, 1)."""

    def loss(
        self,
        target: torch.Tensor,
        hidden: torch.Tensor,
        mask: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """
        Mean loss.

        Args:
            target: (batch, n, token_size) tokens.
            hidden: (batch, n, hidden_size).
            mask: (batch, n), nonzero where a token counts; default: all.
            generator: one, or one per row of the batch; `None` is torch's global one.

        Returns:
            scalar float32.

        Raises:
            ValueError: shapes that do not belong together.
        """
        if target.shape != (*hidden.shape[:-1], self.token_size) or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"target {tuple(target.shape)} and hidden {tuple(hidden.shape)} do not belong together; this head takes "
                f"(batch, n, {self.token_size}) and (batch, n, {self.hidden_size})."
            )
        losses = self.token_losses(target.float(), hidden, generator)
        if mask is None:
            return losses.mean()
        weights = mask.to(losses.dtype)
        return (losses * weights).sum() / weights.sum()

    def sample(
        self,
        hidden: torch.Tensor,
        guidance: float | torch.Tensor | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        do_sample: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """
        One token for each hidden state.

        Args:
            hidden: (batch, n, hidden_size); with `guidance` (2 * batch, n, hidden_size), conditional rows first.
            guidance: weight of the conditional against the unconditional prediction, or one for each row (batch,); `None`:
                no guidance.
            temperature: above 0; what it scales is the head's matter.
            generator: one, or one per row; `None` is torch's global one.
            do_sample: `False` takes zero for all noise.
            options: of this head.

        Returns:
            (batch, n, token_size) float32.

        Raises:
            ValueError: a value out of range, an odd number of rows with guidance, an unknown option.
        """
        guidance = self.checked_guidance(hidden, guidance, temperature)
        if unknown := options.keys() - self.sample_options():
            raise ValueError(
                f"A {self.head_type} head has no option {', '.join(sorted(unknown))}; it has "
                f"{', '.join(sorted(self.sample_options())) or 'none'}."
            )
        return self.draw(hidden, guidance, temperature, generator, do_sample, **options)

    def checked_guidance(
        self, hidden: torch.Tensor, guidance: float | torch.Tensor | None, temperature: float
    ) -> float | torch.Tensor | None:
        """Refuses what `sample` does; guidance of several rows as (batch * n, 1)."""
        check_draw(self.head_type, self.hidden_size, hidden, guidance, temperature)
        if isinstance(guidance, torch.Tensor):
            return guidance.repeat_interleave(hidden.shape[1]).unsqueeze(-1)
        return guidance

    @classmethod
    def sample_options(cls) -> set[str]:
        """Options of `sample` that only some heads have."""
        return set()

    def confidence(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """How sure the head is of tokens (batch, n, token_size) given hidden states, (batch, n); if it can say."""
        raise ValueError(f"A {self.head_type} head does not tell how sure it is of a token.")

    def check_num_steps(self, num_steps: int) -> None:
        """Refuses a number of steps that the head cannot take."""

    def nearest_num_steps(self, num_steps: int) -> int:
        """The largest number of steps up to `num_steps` that the head can take."""
        return num_steps

    def normal(
        self, shape: tuple[int, ...], like: torch.Tensor, generator: Generators, do_sample: bool = True
    ) -> torch.Tensor:
        """Noise of the given shape (batch, ...) on the device of `like`; zeros where nothing is drawn."""
        if not do_sample:
            return torch.zeros(shape, device=like.device)
        return sampling.normal(shape, generator, like.device)


def check_sizes(head_type: str, **sizes: Any) -> None:
    """Refuses what is no whole number above 0."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name} of the {head_type} head is {value!r}; it must be a whole number of at least 1."
            )


def check_draw(
    head_type: str,
    hidden_size: int,
    hidden: torch.Tensor,
    guidance: float | torch.Tensor | None,
    temperature: float,
) -> None:
    """Refuses hidden states, guidance and temperature from which a head cannot draw."""
    if hidden.ndim != 3 or hidden.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden has the shape {tuple(hidden.shape)}; this head takes (batch, n, {hidden_size})."
        )
    if guidance is not None and len(hidden) % 2:
        raise ValueError(
            f"hidden has {len(hidden)} rows; with guidance there are as many conditional as unconditional ones."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}; a {head_type} head needs a number above 0 (do_sample=False draws nothing)."
        )


def per_row(draw: Any, batch: int, multiplier: int, generator: Generators) -> torch.Tensor:
    """
    Noise of the loss, (multiplier, batch, ...): by one generator in this order, by one per row each for itself.

    Args:
        draw: from leading dimensions and a generator to noise.
    """
    if isinstance(generator, list | tuple):
        return torch.cat([draw((multiplier, 1), one) for one in generator], dim=1)
    return draw((multiplier, batch), generator)
