"""The logits warpers of transformers, several in one pass where a kernel does the work."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..kernels.sample_logits import filter_logits, runs_here

# In the order in which transformers applies them, which is that of the kernel.
ORDER = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
OPTIONS = ("temperature", "top_k", "top_p", "min_p")


def warped(processors: Sequence[Any], scores: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """
    Scores through processors that look at the scores alone.

    Args:
        processors: logits processors of transformers.
        scores: (rows, vocab_size) float32.
        input_ids: what processors are given for a context, (rows, 0).

    Returns:
        (rows, vocab_size) float32.
    """
    if not runs_here(scores):
        for processor in processors:  # not as a list of transformers, which reads their signatures every time
            scores = processor(input_ids, scores)
        return scores
    left = list(processors)
    while left:
        together = fusible(left)
        if len(together) > 1 or isinstance(left[0], TopPLogitsWarper):  # one that sorts pays alone
            scores = filter_logits(scores, **together)
        else:
            together = {"one": None}
            scores = left[0](input_ids, scores)
        left = left[len(together) :]
    return scores


def fusible(processors: Sequence[Any]) -> dict[str, Any]:
    """The options of the first few processors, as far as one pass of the kernel does what they do."""
    options: dict[str, Any] = {}
    next_place = 0
    for processor in processors:
        kind = type(processor)
        if kind not in ORDER[next_place:] or not _is_plain(processor):
            break
        next_place = ORDER.index(kind) + 1
        name = OPTIONS[next_place - 1]
        options[name] = getattr(processor, name)
    return options


def warps_alone(processors: Sequence[Any]) -> dict[str, Any] | None:
    """The options of [`fusible`] if these are all that the processors do; otherwise `None`."""
    options = fusible(processors)
    return options if len(options) == len(processors) else None


def _is_plain(processor: Any) -> bool:
    """Whether it removes by -inf, has no least number of tokens that it does not remove, and keeps more than the best one."""
    if getattr(processor, "top_p", 1.0) == 0:
        return False
    removes = getattr(processor, "filter_value", -torch.inf) == -torch.inf
    return removes and getattr(processor, "min_tokens_to_keep", 1) == 1
