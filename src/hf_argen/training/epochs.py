"""Telling a data set its epoch."""

from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """
    Calls `set_epoch` of a data set that gives other items in every epoch, such as [`TokenDataset`]. By itself `Trainer`
    does so only in a single process, and with some releases not in the epoch that a run resumes in.

    Args:
        dataset: with a method `set_epoch`.
    """

    def __init__(self, dataset: Dataset):
        if not hasattr(dataset, "set_epoch"):
            raise ValueError(
                f"{type(dataset).__name__} has no set_epoch; its items are the same in every epoch."
            )
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))
