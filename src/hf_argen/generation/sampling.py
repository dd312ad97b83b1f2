"""
The primitives through which all randomness of generation passes.

A test can put another source in their place ([`randomness`]), for example one that follows every branch of the
random choices with its weight, and so prove a decoding exact in distribution.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import torch

from ..kernels.sample_logits import runs_here, sample_logits
from .guidance import PairedLogits

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the whole batch, or one per row (then a row's draws do not depend on the batch around it)."""


class Randomness(Protocol):
    """A source of random choices."""

    def categorical(self, probs: torch.Tensor, generator: Generators) -> torch.Tensor: ...

    def without_replacement(self, probs: torch.Tensor, count: int, generator: Generators) -> torch.Tensor: ...

    def bernoulli(self, probs: torch.Tensor, generator: Generators) -> torch.Tensor: ...

    def gumbel(self, like: torch.Tensor, generator: Generators) -> torch.Tensor: ...

    def uniform(
        self, choices: int, count: int, generator: Generators, device: torch.device
    ) -> torch.Tensor: ...

    def normal(self, shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor: ...

    def rand(self, shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor: ...

    def permutations(
        self, items: int, count: int, generator: Generators, device: torch.device
    ) -> torch.Tensor: ...


class TorchRandomness:
    """Draws from torch's generators."""

    @staticmethod
    def exponential(like: torch.Tensor, generator: Generators) -> torch.Tensor:
        """Standard exponential noise, shape and dtype of `like` (batch, ...)."""
        noise = torch.empty_like(like, memory_format=torch.contiguous_format)
        if isinstance(generator, Sequence):
            for row, row_generator in zip(noise, generator, strict=True):
                row.exponential_(generator=row_generator)
            return noise
        return noise.exponential_(generator=generator)

    def categorical(self, probs: torch.Tensor, generator: Generators) -> torch.Tensor:
        # The exponential race: what torch.multinomial does for one sample, so that seeds agree with it on the CPU.
        return torch.argmax(probs / self.exponential(probs, generator), dim=-1)

    def without_replacement(self, probs: torch.Tensor, count: int, generator: Generators) -> torch.Tensor:
        # The first of the race and those that come after it: as torch.multinomial without replacement.
        return torch.topk(probs / self.exponential(probs, generator), count, dim=-1).indices

    def bernoulli(self, probs: torch.Tensor, generator: Generators) -> torch.Tensor:
        uniform = torch.empty_like(probs, memory_format=torch.contiguous_format)
        if isinstance(generator, Sequence):
            for row, row_generator in zip(uniform, generator, strict=True):
                row.uniform_(generator=row_generator)
        else:
            uniform.uniform_(generator=generator)
        return uniform < probs

    def gumbel(self, like: torch.Tensor, generator: Generators) -> torch.Tensor:
        return -self.exponential(like, generator).log()

    def uniform(self, choices: int, count: int, generator: Generators, device: torch.device) -> torch.Tensor:
        probs = torch.full((choices,), 1 / choices, device=device)
        if isinstance(generator, Sequence):
            return torch.cat([torch.multinomial(probs, 1, True, generator=one) for one in generator])
        return torch.multinomial(probs, count, True, generator=generator)

    def normal(self, shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor:
        if isinstance(generator, Sequence):
            rows = [torch.randn(*shape[1:], generator=one, device=device) for one in generator]
            return torch.stack(rows)
        return torch.randn(*shape, generator=generator, device=device)

    def rand(self, shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor:
        if isinstance(generator, Sequence):
            rows = [torch.rand(*shape[1:], generator=one, device=device) for one in generator]
            return torch.stack(rows)
        return torch.rand(*shape, generator=generator, device=device)

    def permutations(
        self, items: int, count: int, generator: Generators, device: torch.device
    ) -> torch.Tensor:
        several = generator if isinstance(generator, Sequence) else [generator] * count
        return torch.stack([torch.randperm(items, generator=one, device=device) for one in several])


_TORCH: Randomness = TorchRandomness()
_source: ContextVar[Randomness] = ContextVar("hf_argen_randomness", default=_TORCH)


@contextmanager
def randomness(source: Randomness) -> Iterator[Randomness]:
    """Within the `with` block, `source` makes all random choices of generation."""
    token = _source.set(source)
    try:
        yield source
    finally:
        _source.reset(token)


def is_torch() -> bool:
    """Whether torch's generators make the choices, so that noise may be drawn for a kernel; not where a test chooses."""
    return _source.get() is _TORCH


def runs_fused(scores: torch.Tensor) -> bool:
    """Whether a kernel draws from scores (..., choices) in place of the primitives, from noise that it is given."""
    return is_torch() and runs_here(scores)


def exponential(like: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """Standard exponential noise, shape and dtype of `like` (batch, ...), for kernels; see [`runs_fused`]."""
    return TorchRandomness.exponential(like, generator)


def categorical(probs: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """
    One draw from each distribution.

    Args:
        probs: (batch, ..., choices) float32, each row of the last dimension a distribution.
        generator: one, or one per row of the batch; `None` is torch's global one.

    Returns:
        (batch, ...) int64.
    """
    return _source.get().categorical(probs, generator)


def draw(scores: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """
    One draw from softmax(scores): the token that [`categorical`] draws from it.

    Args:
        scores: (batch, ..., choices) float32, -inf for what must not be drawn.
        generator: as for [`categorical`].

    Returns:
        (batch, ...) int64.
    """
    if not runs_fused(scores):
        return categorical(scores.softmax(dim=-1), generator)
    noise = exponential(scores, generator)
    rows = (-1, scores.shape[-1])
    return sample_logits(scores.reshape(rows), noise.view(rows))[0].view(scores.shape[:-1])


def draw_guided(
    paired: PairedLogits, options: dict[str, Any], generator: Generators = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Guidance, warpers and one draw in one pass; for a kernel, see [`runs_fused`].

    Args:
        paired: of (batch, ..., choices) draws, with a `strength`.
        options: `temperature`, `top_k`, `top_p`, `min_p` of [`hf_argen.kernels.sample_logits.sample_logits`].
        generator: as for [`categorical`], which draws the same from the same generator.

    Returns:
        the choices (batch, ...) int64, and their log probabilities (batch, ...) float32: NaN where logits are NaN or infinite,
        -inf where all of them are -inf.
    """
    conditional, unconditional = paired.halves()
    shape, rows = conditional.shape, (-1, conditional.shape[-1])
    noise = exponential(conditional.new_empty(shape, dtype=torch.float32), generator)
    other = {}
    if unconditional is not None:
        other = {"unconditional": unconditional.reshape(rows), "guidance": paired.strength}
    ids, log_probs, _ = sample_logits(conditional.reshape(rows), noise.view(rows), **other, **options)
    return ids.view(shape[:-1]), log_probs.view(shape[:-1])


def bernoulli(probs: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """One yes-or-no draw for each probability in `probs` (batch, ...) float32; bool of the same shape."""
    return _source.get().bernoulli(probs, generator)


def gumbel(like: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """Standard Gumbel noise, shape and dtype of `like` (batch, ...)."""
    return _source.get().gumbel(like, generator)


def uniform(choices: int, count: int, generator: Generators, device: torch.device) -> torch.Tensor:
    """`count` draws, one per row of the batch, from 0 to `choices` - 1 with equal probability; (count,) int64."""
    return _source.get().uniform(choices, count, generator, device)


def without_replacement(probs: torch.Tensor, count: int, generator: Generators = None) -> torch.Tensor:
    """
    `count` different choices from each distribution, one after another, each in proportion to what is left.

    Args:
        probs: (batch, ..., choices) float32, each row of the last dimension a distribution.
        generator: one, or one per row of the batch; `None` is torch's global one.

    Returns:
        (batch, ..., count) int64 in the order drawn; where fewer choices have a probability, any others follow.
    """
    return _source.get().without_replacement(probs, count, generator)


def one_hot(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Distributions (..., vocab_size), like those of `like`, that are all on the given tokens (...)."""
    zeros = like.new_zeros(*tokens.shape, like.shape[-1])
    return zeros.scatter_(-1, tokens.unsqueeze(-1), 1.0)


def acceptance(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """min(1, p / q): how probably speculative sampling keeps a draft (arXiv 2211.17192)."""
    return (target / draft.clamp(min=torch.finfo(draft.dtype).tiny)).clamp(max=1.0)


def residual(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """The distribution max(p - q, 0), normalised, that makes up for rejected drafts; p where nothing is left."""
    rest = (target - draft).clamp(min=0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), target)


def normal(shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor:
    """Standard normal noise of the given shape (batch, ...), float32."""
    return _source.get().normal(shape, generator, device)


def rand(shape: Sequence[int], generator: Generators, device: torch.device) -> torch.Tensor:
    """Uniform noise in [0, 1) of the given shape (batch, ...), float32."""
    return _source.get().rand(shape, generator, device)


def permutations(items: int, count: int, generator: Generators, device: torch.device) -> torch.Tensor:
    """`count` orders of `items` things, one per row of the batch, each equally likely; (count, items) int64."""
    return _source.get().permutations(items, count, generator, device)


def numpy_permutations(items: int, count: int, device: torch.device) -> torch.Tensor:
    """As [`permutations`], from numpy's global generator: so authors draw whose pictures a seed shall give again."""
    orders = np.tile(np.arange(items), (count, 1))
    for order in orders:
        np.random.shuffle(order)
    return torch.from_numpy(orders).to(device)


def gumbel_softmax(logits: torch.Tensor, temperature: float, generator: Generators = None) -> torch.Tensor:
    """A relaxed one-hot draw (arXiv 1611.01144): softmax((logits + Gumbel noise) / temperature), shape of `logits`."""
    return ((logits + gumbel(logits, generator)) / temperature).softmax(dim=-1)


def snapshot(generator: Generators, device: torch.device) -> torch.Tensor | list[torch.Tensor]:
    """The state of the generators, for [`rewind`]; of the global one of `device` if there are none."""
    if isinstance(generator, Sequence):
        return [row_generator.get_state() for row_generator in generator]
    if generator is not None:
        return generator.get_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def synchronize(generator: Generators, device: torch.device, group: Any) -> None:
    """
    Gives all processes of a group the random state of its first one, so that they draw the same from here on.

    Args:
        generator: as for [`snapshot`]; every process of the group has as many.
        device: where the model is, and what the group's back end can send.
        group: a `ProcessGroup`, for example of tensor parallelism.
    """
    state = snapshot(generator, device)
    states = torch.stack(state if isinstance(state, list) else [state]).to(device)
    torch.distributed.broadcast(states, group=group, group_src=0)
    shared = [one.clone() for one in states.cpu()]  # a generator reads a view from the start of its memory
    if generator is not None:
        rewind(generator, shared if isinstance(generator, Sequence) else shared[0])
    elif device.type == "cuda":
        torch.cuda.set_rng_state(shared[0], device)
    else:
        torch.set_rng_state(shared[0])


def rewind(generator: Generators, state: torch.Tensor | list[torch.Tensor]) -> None:
    """Puts generators back into the state that [`snapshot`] took."""
    if isinstance(generator, Sequence):
        for row_generator, row_state in zip(generator, state, strict=True):
            row_generator.set_state(row_state)
    elif generator is not None:
        generator.set_state(state)
