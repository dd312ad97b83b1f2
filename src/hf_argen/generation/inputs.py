"""What a call of `generate()` is given to draw from, as tensors with one row per picture."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import sampling
from .decoding.base import Edit
from .sampling import Generators


def expand_conditions(
    model: Any,
    class_labels: torch.Tensor | Sequence[int] | int | None,
    texts: dict[str, torch.Tensor | None],
    num_return_sequences: int,
    generator: Generators,
) -> tuple[dict[str, Any], int]:
    """
    The conditions on the model's device, each repeated `num_return_sequences` times.

    Args:
        class_labels: see `generate`.
        texts: `prompt_embeds`, `prompt_ids`, `prompt_attention_mask`.
        generator: draws the classes where none are given.

    Returns:
        Keywords of the model's `condition`, and the number of pictures.

    Raises:
        ValueError: conditions of another kind than the model's, none at all, or of the wrong shape or type.
    """
    device = model.input_device
    given = {name: value for name, value in texts.items() if value is not None}
    if model.config.condition_type == "class":
        if given:
            raise ValueError(f"This model draws from class labels; it cannot read {', '.join(given)}.")
        if class_labels is None:
            drawn = sampling.uniform(model.config.num_classes, num_return_sequences, generator, device)
            return {"class_labels": drawn}, num_return_sequences
        inputs = {"class_labels": as_class_labels(class_labels).to(device)}
        model.check_class_labels(inputs["class_labels"])
    elif class_labels is not None:
        raise ValueError("This model draws from text; give prompt_ids or prompt_embeds, not class_labels.")
    else:
        inputs = {name: _tensor(name, value).to(device) for name, value in given.items()}
        if not inputs:
            return {"batch_size": num_return_sequences}, num_return_sequences
    expanded = {name: value.repeat_interleave(num_return_sequences, dim=0) for name, value in inputs.items()}
    return expanded, next(iter(expanded.values())).shape[0]


def as_class_labels(labels: Any) -> torch.Tensor:
    """
    Class labels as users write them (a number, several, an array) as a tensor (batch,).

    Raises:
        ValueError: something else than whole numbers, or none.
    """
    if isinstance(labels, np.ndarray | np.generic):
        labels = torch.as_tensor(labels)
    if isinstance(labels, torch.Tensor):
        tensor = labels.view(1) if labels.ndim == 0 else labels
    else:
        labels = [labels] if isinstance(labels, Integral) else labels
        is_whole = isinstance(labels, Sequence) and all(
            isinstance(label, Integral) and not isinstance(label, bool) for label in labels
        )
        if not is_whole:
            raise ValueError(f"class_labels are {labels!r}; give whole numbers, -1 for no class.")
        tensor = torch.tensor(labels, dtype=torch.long)
    if tensor.shape[:1] == (0,):
        raise ValueError("The list of conditions is empty; give at least one class label.")
    return tensor


def prepare_edit(model: Any, sources: dict[str, Any], keep_mask: Any, batch_size: int) -> Edit | None:
    """
    The source picture as tokens and the mask on the last token grid, one of each per picture; `None` without.

    Args:
        sources: `pixel_values`, and the model's kind of tokens, `input_ids` or `latents`; `None` where not given.
        keep_mask: see `generate`.
    """
    kind, other = ("latents", "input_ids") if model.draws_latents else ("input_ids", "latents")
    if sources[other] is not None:
        raise ValueError(f"The tokens of this model are {kind}; give these, or pixel_values, not {other}.")
    pixel_values, tokens = sources["pixel_values"], sources[kind]
    if pixel_values is None and tokens is None and keep_mask is None:
        return None
    if keep_mask is None or (pixel_values is None) == (tokens is None):
        raise ValueError(f"Editing needs keep_mask and the source picture, as pixel_values or as {kind}.")
    if tokens is None:
        source = model.encode_images(_tensor("pixel_values", pixel_values).to(model.input_device))
    else:
        source = _tensor(kind, tokens).to(model.input_device)
    return Edit(
        ids=_one_per_row(source, batch_size, "source picture"),
        keep=_one_per_row(mask_on_grid(model, keep_mask), batch_size, "keep_mask"),
    )


def mask_on_grid(model: Any, keep_mask: Any) -> torch.Tensor:
    """A mask on the last token grid or in pixels to (batch, h, w) float32 of 0 and 1 on the grid."""
    grid = model.config.grid_sizes[-1]
    if getattr(model.config, "grid_size", grid) is None:
        picture = None  # tokens of one row, none of which is a place of the picture
    else:
        latents = getattr(model.config, "patch_size", 1)  # of a side of a token, where these are squares
        factor = model.check_image_tokenizer().config.downsampling_factor * latents
        picture = (grid[0] * factor, grid[1] * factor)
    try:
        mask = torch.as_tensor(keep_mask, device=model.input_device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"keep_mask is a {type(keep_mask).__name__}; give a tensor.") from error
    size = tuple(mask.shape[-2:])
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim not in (2, 3) or size not in (grid, picture):
        pixels = (
            f" or {picture[0]}x{picture[1]} pixels" if picture else ", which are no places of the picture"
        )
        raise ValueError(
            f"keep_mask has the shape {tuple(mask.shape)}; give (height, width) or (batch, height, width) of "
            f"{grid[0]}x{grid[1]} tokens{pixels}."
        )
    mask = (mask != 0).float().view(-1, *size)
    return mask if size == grid else F.interpolate(mask[:, None], size=grid, mode="nearest")[:, 0]


def check_helpers(generator: Any, logits_processor: Any, stopping_criteria: Any, streamer: Any) -> None:
    """Refuses objects that cannot do what they are given for."""
    several = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in several):
        raise ValueError(f"generator is {generator!r}; give a torch.Generator, or a list of one per picture.")
    for name, value in {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}.items():
        if value is not None and not (isinstance(value, list) and all(map(callable, value))):
            raise ValueError(f"{name} is {value!r}; give a list of functions or of transformers' objects.")
    if streamer is not None and not all(hasattr(streamer, method) for method in ("put", "end")):
        raise ValueError(f"streamer is {streamer!r}; give an object with the methods put and end.")


def check_number_of_generators(generator: Generators, batch_size: int) -> None:
    """One generator, or one for each picture."""
    if isinstance(generator, Sequence) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators were given for {batch_size} pictures; give one for each."
        )


def _tensor(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} are given as {type(value).__name__}; give a tensor.")
    return value


def _one_per_row(value: torch.Tensor, batch_size: int, name: str) -> torch.Tensor:
    if value.shape[0] not in (1, batch_size):
        expected = "1" if batch_size == 1 else f"1 or {batch_size}"
        raise ValueError(f"The batch of the {name} is {value.shape[0]}; it must be {expected}.")
    return value.expand(batch_size, *value.shape[1:])
