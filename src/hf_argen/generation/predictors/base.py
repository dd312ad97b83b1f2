"""The protocol that every decoding drives and every corridor implements."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers import CompileConfig

from ..compilation import CompiledSteps


class Predictor(ABC):
    """
    One guided forward pass of a model, together with its cache.

    A predictor is the only code that knows model, cache and classifier-free guidance together. Guided requests run
    as paired rows of one batch, so that the cache rolls back as a whole; a decoding only sees the request's rows.

    Attributes:
        length: (batch,) int64, committed tokens of each row.
        capacity: tokens that fit.
        calls: forward calls of the model so far.
        default_decoding: name of the plain decoding of models with this predictor.
        steps: the compiled steps of the model, where the request asks for them.
    """

    default_decoding: ClassVar[str]

    model: Any
    length: torch.Tensor
    capacity: int
    calls: int
    steps: CompiledSteps | None = None

    def why_not_compiled(self) -> str | None:
        """What keeps its steps from being compiled; `None` if nothing does."""
        return None

    def compile(self, config: CompileConfig) -> None:
        """From now on steps run as compiled graphs; to be called before `prefill`."""
        self.steps = CompiledSteps.of(self.model, config)

    def run(self, step: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        """`step(*arguments)`, compiled where the request asks for it; see [`CompiledSteps`]."""
        return step(*arguments) if self.steps is None else self.steps(step, *arguments)

    @abstractmethod
    def prefill(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Reads the request; guided float32 logits of the first position (or group of positions)."""

    @abstractmethod
    def predict(self, tokens: torch.Tensor | None, positions: Any = None) -> torch.Tensor:
        """Guided float32 logits at `positions` (or after nodes, by their parents), given uncommitted `tokens`."""

    @abstractmethod
    def commit(self, keep: torch.Tensor | None, count: torch.Tensor | None = None) -> None:
        """Makes tokens part of the sequence."""

    @abstractmethod
    def steps_for(self, max_new_tokens: int) -> int:
        """Decoding steps that give so many tokens; an error if no number of whole steps does."""

    @abstractmethod
    def fork(self, n: int) -> None:
        """Repeats every row `n` times, copies next to each other."""

    @abstractmethod
    def drop(self, rows: torch.Tensor) -> None:
        """Removes the rows with these indices."""
