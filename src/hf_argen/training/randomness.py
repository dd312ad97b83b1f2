"""Annealing of the randomness with which RAR orders the tokens of a picture in training (arXiv 2411.00776)."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import unwrap_model


class RandomnessAnnealing(TrainerCallback):
    """
    Before every optimiser step tells a model which share of its rows to put in random order: all of them up to the step
    `start`, from there linearly fewer, none from the step `end` on. It follows the step that `Trainer` counts, so that a
    training that is resumed goes on where it was.

    >>> Trainer(model, arguments, train_dataset=rows, callbacks=[RandomnessAnnealing(125_000, 187_500)])

    Args:
        start, end: optimiser steps; in the paper one half and three quarters of the training.

    Raises:
        ValueError: `end` before `start`, or a negative `start`.
    """

    def __init__(self, start: int, end: int):
        if not 0 <= start <= end:
            raise ValueError(
                f"The randomness shall be annealed from step {start} to step {end}; these must be 0 or above, in this order."
            )
        self.start, self.end = start, end

    def ratio(self, step: int) -> float:
        """The share of rows in random order at a step."""
        if step < self.start:
            return 1.0
        if step >= self.end:
            return 0.0
        return 1.0 - (step - self.start) / (self.end - self.start)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        inner = unwrap_model(model)
        if not hasattr(inner, "set_randomness_ratio"):
            raise ValueError(
                f"{type(inner).__name__} has no order of tokens to randomise; use the callback with RAR."
            )
        inner.set_randomness_ratio(self.ratio(state.global_step))
