"""The protocol that every decoding drives and every corridor implements."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch


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
    """

    default_decoding: ClassVar[str]

    length: torch.Tensor
    capacity: int
    calls: int

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
