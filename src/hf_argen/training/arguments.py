"""`TrainingArguments` that suit the models of this package."""

import os
from typing import Any

from transformers import TrainingArguments


def training_arguments(
    output_dir: str | os.PathLike, *, from_pixels: bool = False, **kwargs: Any
) -> TrainingArguments:
    """
    [`~transformers.TrainingArguments`] under which `Trainer` trains and evaluates our models.

    transformers takes every input with "label" in its name for a target, `class_labels` among them; here the targets
    are named. With pictures there are none in the batch, since the model tokenizes them itself and returns the loss.

    Args:
        output_dir: where checkpoints go.
        from_pixels: batches hold `pixel_values` rather than `input_ids` and `labels`; also for training a tokenizer.
        kwargs: any other training argument. `remove_unused_columns` is off and `prediction_loss_only` on unless given:
            the logits of a picture are large, and nobody reads them.
    """
    defaults = {
        "label_names": [] if from_pixels else ["labels"],
        "remove_unused_columns": False,
        "prediction_loss_only": True,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **kwargs})
