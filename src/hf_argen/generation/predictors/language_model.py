"""Predictor of the language models of transformers."""

from typing import Any

import torch

from .. import _compat
from ..guidance import Guidance, LogProbabilityCombiner
from .masks import Pattern
from .next_token import NextTokenPredictor


class LanguageModelPredictor(NextTokenPredictor):
    """
    Drives any decoder-only language model of transformers whose layers are attention over a key-value cache.

    Where rows are even and nodes form a chain, the model makes its attention masks itself, as in its own `generate`.

    Args:
        model: the language model.
        guidance_scale: of guidance on log probabilities; 1 is none.
        unconditional: `input_ids` and `attention_mask` of the unconditional rows; default: the last token of the
            prompt.

    Attributes:
        feature_layers: which of the model's hidden states to keep, as transformers counts them (0 goes into the first
            layer, -1 comes out of the last norm); set before `prefill`.
        features: (batch, n, sum of sizes) those of the n tokens that were fed last, side by side; the conditional ones.

    Raises:
        ValueError: a model that keeps a state which cannot be rolled back, or takes no positions.
    """

    def __init__(
        self, model: Any, guidance_scale: float = 1.0, unconditional: dict[str, torch.Tensor] | None = None
    ):
        if problem := _compat.why_not_decodable(model):
            raise ValueError(f"{type(model).__name__} cannot be decoded by ours: {problem}.")
        super().__init__(model, Guidance(0.0))
        self.guidance_scale = guidance_scale
        self.is_guided = guidance_scale != 1.0
        self.unconditional = unconditional or {}
        self._cache_name = _compat.cache_argument(model)
        self._keeps_logits = _compat.takes_argument(model, "logits_to_keep")
        self._patterns = _compat.attention_patterns(model)
        self.feature_layers: tuple[int, ...] = ()
        self.features: torch.Tensor | None = None
        self._most_positions = getattr(_compat.text_config(model), "max_position_embeddings", None)

    def for_model(self, model: Any) -> "LanguageModelPredictor":
        return type(self)(model, self.guidance_scale, self.unconditional)

    def why_not_compiled(self) -> str | None:
        return (
            "language models of transformers are compiled by their own generate(), without a decoding of ours"
        )

    def most_tokens(self) -> int:
        return 0  # no grid to fill: `reserve` says how many

    def context_left(self) -> int | None:
        if self._most_positions is None:
            return None
        return max(self._most_positions - self._prompt_length - max(self._lengths), 0)

    def num_layers(self) -> int:
        return _compat.text_config(self.model).num_hidden_layers

    def patterns(self) -> Pattern | dict[str, Pattern]:
        def pattern(kind: str) -> Pattern:
            window, chunk = self._patterns[kind]
            return Pattern(window=window, chunk=chunk)

        if len(self._patterns) == 1:
            return pattern(next(iter(self._patterns)))
        return {kind: pattern(kind) for kind in self._patterns}

    def combiner(self, device: torch.device) -> LogProbabilityCombiner:
        return LogProbabilityCombiner(self.guidance_scale)

    def read_prompt(self, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Args:
            inputs: `input_ids` (batch, length) or `inputs_embeds` (batch, length, hidden_size), `attention_mask`
                (batch, length) or `None`, and what else the model's first call takes.
        """
        inputs = dict(inputs)
        ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        mask = inputs.pop("attention_mask", None)
        prompt = ids if embeds is None else embeds
        if self.is_guided:
            if embeds is not None or inputs:
                raise ValueError(
                    "guidance_scale on a language model works with input_ids alone, not with "
                    f"{', '.join(inputs) or 'inputs_embeds'}."
                )
            prompt, mask = self._with_unconditional(ids, mask)
        hidden = None if mask is None or bool((mask != 0).all()) else mask == 0
        self.start(*prompt.shape[:2], hidden, prompt.device)
        positions = torch.arange(prompt.shape[1], device=prompt.device).expand(prompt.shape[:2])
        if hidden is not None:
            positions = ((~hidden).cumsum(dim=1) - 1).clamp(min=0)
        name = "input_ids" if embeds is None else "inputs_embeds"
        return self._call({name: prompt}, positions, self._mask_of_columns(0), 1, inputs)

    def _with_unconditional(
        self, ids: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both prompts as rows of one batch, the shorter ones padded on the left."""
        other = self.unconditional.get("input_ids")
        other = ids[:, -1:] if other is None else other.to(ids.device)
        other_mask = self.unconditional.get("attention_mask")
        other_mask = torch.ones_like(other) if other_mask is None else other_mask.to(ids.device)
        if len(other) != len(ids):
            raise ValueError(f"The batch of the negative prompt is {len(other)}; it must be {len(ids)}.")
        mask = torch.ones_like(ids) if mask is None else mask
        width = max(ids.shape[1], other.shape[1])

        def padded(value: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(value, (width - value.shape[1], 0))

        return (
            torch.cat([padded(ids), padded(other)]),
            torch.cat([padded(mask), padded(other_mask.to(mask.dtype))]),
        )

    def feed(self, tokens: torch.Tensor, positions: torch.Tensor, needs_mask: bool) -> torch.Tensor:
        if self._hidden is not None:
            positions = positions - self._hidden.sum(dim=1)[:, None]
        if needs_mask:
            if problem := _compat.why_no_own_masks(self.model):
                raise ValueError(problem)
            if self._most_positions is not None:  # rows that have ended still take part
                positions = positions.clamp(max=self._most_positions - 1)
            mask = self.mask(tokens.shape[1], self.model.dtype)
        else:
            mask = self._mask_of_columns(max(self._lengths) + self._nodes.size)
        return self._call({"input_ids": tokens}, positions, mask, tokens.shape[1], {})

    def _mask_of_columns(self, beyond_prompt: int) -> torch.Tensor | None:
        """(rows, columns) int64, 1 where there is no padding; `None` if there is none at all."""
        if self._hidden is None:
            return None
        prompt = (~self._hidden).long()
        return torch.cat([prompt, prompt.new_ones(len(prompt), beyond_prompt)], dim=1)

    def _call(
        self,
        inputs: dict[str, torch.Tensor],
        positions: torch.Tensor,
        mask: Any,
        last: int,
        extras: dict[str, Any],
    ) -> torch.Tensor:
        keep = {"logits_to_keep": last} if self._keeps_logits else {}
        output = self.model(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            **({"output_hidden_states": True} if self.feature_layers else {}),
            **{self._cache_name: self._cache},
            **keep,
            **extras,
        )
        if self.feature_layers:
            kept = [output.hidden_states[layer][: self.batch_size] for layer in self.feature_layers]
            self.features = torch.cat(kept, dim=-1)
        return output.logits[:, -last:]
