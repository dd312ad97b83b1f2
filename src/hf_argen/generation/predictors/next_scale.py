"""Predictor of next-scale models (VAR, arXiv 2404.02905): one call predicts all tokens of a scale."""

from typing import Any

import torch

from ..cache import PreallocatedCache
from ..guidance import Guidance, PairedLogits, guide
from .base import Predictor


class NextScalePredictor(Predictor):
    """
    Drives a model that has `condition`, `null_condition`, `scale_logits` and a tokenizer with a multi-scale
    `quantizer`.

    What is committed is the *feature map*: the sum, at the size of the last scale, of what the scales so far
    contribute. The input of the next scale is that map averaged down to its grid, so keys and values of a scale are
    final as soon as they are computed and nothing is ever rolled back.

    Args:
        model: the next-scale model.
        guidance: strength of guidance at each scale.
        image_tokenizer: the tokenizer, when the model comes without one.
    """

    default_decoding = "next_scale"

    def __init__(self, model: Any, guidance: Guidance, image_tokenizer: Any = None):
        self.model = model
        self.guidance = guidance
        self.quantizer = (image_tokenizer or model.check_image_tokenizer()).quantizer
        self.grids: list[tuple[int, int]] = model.config.grid_sizes
        self.scale_lengths: list[int] = model.config.scale_lengths
        self.num_scales = len(self.grids)
        self.capacity = sum(self.scale_lengths)
        self.is_guided = not guidance.is_off(self.num_scales)
        self.calls = 0
        self.step = 0  # the scale that is committed next

    def prefill(self, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Args:
            inputs: keywords of the model's `condition`.

        Returns:
            logits of the first scale (batch, tokens of the scale, vocab_size).
        """
        return self.prefill_paired(inputs).guided()

    def prefill_paired(self, inputs: dict[str, Any]) -> PairedLogits:
        """As `prefill`, with guidance left to do."""
        self.start(inputs)
        return self.predict_paired(None, range(1))

    def start(self, inputs: dict[str, Any]) -> None:
        """Reads the request without predicting anything yet."""
        condition = self.model.condition(**inputs)
        self.batch_size = condition.shape[0]
        if self.is_guided:
            condition = torch.cat([condition, self.model.null_condition(self.batch_size)])
        self._condition = condition
        layers, rows = self.model.config.num_hidden_layers, len(condition)
        if self.steps is None:
            self._cache = PreallocatedCache(layers, self.capacity, fixed=True)
        else:
            self._cache = self.steps.lend_cache(
                self, layers, rows, self.capacity, condition.dtype, condition.device
            )
        self.feature_map = self.quantizer.new_feature_map(self.batch_size, self.grids[-1], condition.device)
        self.length = torch.zeros(self.batch_size, dtype=torch.long, device=condition.device)

    def steps_for(self, max_new_tokens: int) -> int:
        """Scales that `max_new_tokens` tokens make."""
        ends = [sum(self.scale_lengths[: i + 1]) for i in range(self.num_scales)]
        if max_new_tokens not in ends:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; scales end after {ends} tokens: choose one of these."
            )
        return ends.index(max_new_tokens) + 1

    def next_input(self) -> torch.Tensor:
        """The input (batch, tokens, channels) of the scale that comes next: the feature map at its size."""
        return self.quantizer.scale_input(self.feature_map, self.grids[self.step])

    def predict(self, tokens: torch.Tensor | None = None, positions: range | None = None) -> torch.Tensor:
        """
        Args:
            tokens: inputs (batch, n, channels) of the scales in `positions` but the very first one; default: the
                committed feature map at the size of the next scale.
            positions: the scales to run through the model, ending with the one to predict; default: the next one.

        Returns:
            logits (batch, tokens of the last of these scales, vocab_size) float32.
        """
        return self.predict_paired(tokens, positions).guided()

    def predict_paired(
        self, tokens: torch.Tensor | None = None, positions: range | None = None
    ) -> PairedLogits:
        """As `predict`, with guidance left to do, unless a compiled step has done it."""
        positions = range(self.step, self.step + 1) if positions is None else positions
        scale = positions[-1]
        if tokens is None and scale > 0:
            tokens = self.next_input()
        if tokens is not None and self.is_guided:
            tokens = tokens.repeat(2, 1, 1)
        scales = range(positions[0], scale + 1)
        arguments = (self.model, self._condition, tokens, scales, self._cache, self.scale_lengths[scale])
        strength = self.guidance.strength(scale, self.num_scales) if self.is_guided else 0.0
        self.calls += 1
        if self.steps is not None and scale > 0:
            # A tensor is no constant of the graph.
            given = torch.full((), strength, device=self._condition.device) if self.is_guided else None
            return PairedLogits(self.run(scale_step, *arguments, given))
        # The first scale is never compiled: it makes room in the cache, and computes what no later scale changes.
        logits = scale_step(*arguments, None)
        if self.steps is not None:
            self._cache.fix_addresses()
        if not self.is_guided:
            return PairedLogits(logits)
        return PairedLogits(logits, lambda one, other: guide(one, other, strength), strength)

    def commit(self, keep: torch.Tensor, count: torch.Tensor | None = None) -> None:
        """
        Adds a scale to the feature map.

        Args:
            keep: ids (batch, tokens of the scale), or codes (batch, tokens of the scale, channels) in their place.
            count: not used; every row keeps the whole scale.
        """
        codes = keep if keep.is_floating_point() else self.quantizer.embed(keep)
        self.replace_feature_map(self.feature_map + self.quantizer.contribution(codes, self.step, self.grids))

    def replace_feature_map(self, feature_map: torch.Tensor) -> None:
        """Commits a scale by the feature map (batch, channels, h, w) that results from it."""
        self.feature_map = feature_map
        self.length = self.length + self.scale_lengths[self.step]
        self.step += 1

    def adopt(self, other: "NextScalePredictor") -> None:
        """Continues from what another predictor of the same scales has committed."""
        self.feature_map, self.length, self.step = other.feature_map, other.length, other.step

    def fork(self, n: int) -> None:
        self._select(torch.arange(self.batch_size, device=self.length.device).repeat_interleave(n))

    def drop(self, rows: torch.Tensor) -> None:
        keep = torch.ones(self.batch_size, dtype=torch.bool, device=self.length.device)
        keep[rows] = False
        self._select(keep.nonzero()[:, 0])

    def _select(self, rows: torch.Tensor) -> None:
        paired = torch.cat([rows, rows + self.batch_size]) if self.is_guided else rows
        self._condition = self._condition.index_select(0, paired)
        self._cache.select_rows(paired)
        self.feature_map = self.feature_map.index_select(0, rows)
        self.length = self.length.index_select(0, rows)
        self.batch_size = rows.numel()


def scale_step(
    model: Any,
    condition: torch.Tensor,
    features: torch.Tensor | None,
    scales: range,
    cache: PreallocatedCache,
    last_tokens: int,
    strength: torch.Tensor | None,
) -> torch.Tensor:
    """Logits of the last of the scales: of all rows, or with a `strength` guided ones."""
    logits = model.scale_logits(condition, features, scales.start, scales.stop, cache, last_tokens)
    logits = logits.to(condition.device)  # of a model on several devices, the head may be on another
    if strength is None:
        return logits
    return guide(*logits.chunk(2), strength)
