"""Decodings of ours on the language models of transformers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation import BaseStreamer
from transformers.utils import ModelOutput

from ..kernels.sample_logits import check_sampled
from . import _compat
from .predictors.language_model import LanguageModelPredictor
from .sampling import Generators

if TYPE_CHECKING:
    from .decoding.base import Decoding, DecodingResult

# What transformers puts beside the inputs and the predictor makes itself.
OWN = (
    "cache",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "position_ids",
    "cache_position",
    "synced_gpus",
)


@dataclass
class LanguageModelOutput(ModelOutput):
    """
    What `generate(..., return_dict_in_generate=True)` returns on a language model.

    Attributes:
        sequences: (batch, length) int64, prompt and generated ids.
        scores, logits: with `output_scores` and `output_logits`, one (batch, vocab_size) float32 per token, after and
            before the logits processors.
        steps: decoding steps.
        forward_calls: forward calls of the model, those of a drafter included.
        accept_lengths: draft-and-verify decodings: tokens that each call added, (batch, calls) int64.
    """

    sequences: torch.Tensor | None = None
    scores: tuple[torch.FloatTensor, ...] | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None
    steps: int | None = None
    forward_calls: int | None = None
    accept_lengths: torch.Tensor | None = None


@dataclass
class BoundDecoding:
    """
    A decoding with what transformers drops before it calls `custom_generate`.

    Args:
        decoding: the decoding.
        streamer: hears the prompt and then every token.
        tokenizer, stop_strings: texts at which a row stops, and the tokenizer that spells them.
        generator: one for the batch, or one per row.
    """

    decoding: "Decoding"
    streamer: BaseStreamer | None = None
    tokenizer: Any = None
    stop_strings: str | Sequence[str] | None = None
    generator: Generators = None

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """See [`Decoding`]."""
        if self.stop_strings is not None:
            if self.tokenizer is None:
                raise ValueError("stop_strings need the tokenizer that spells them; give tokenizer=.")
            stop = StopStringCriteria(self.tokenizer, self.stop_strings)
            stopping_criteria = StoppingCriteriaList([*stopping_criteria, stop])
        return decode(
            self.decoding,
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer=self.streamer,
            generator=self.generator,
            **model_kwargs,
        )


def generate(model: Any, decoding: "Decoding", inputs: dict[str, Any]) -> Any:
    """`model.generate(**inputs)` of a language model, decoded by `decoding`."""
    inputs = dict(inputs)
    if inputs.pop("assistant_model", None) is not None:
        raise ValueError(
            "assistant_model is how transformers drafts; a decoding of ours has its own drafter."
        )
    bound = {name: inputs.pop(name, None) for name in ("streamer", "tokenizer", "generator", "stop_strings")}
    given = inputs.get("generation_config")
    if given is not None and given.stop_strings is not None:
        bound["stop_strings"] = bound["stop_strings"] or given.stop_strings
        inputs["generation_config"] = given = copy.deepcopy(given)
        given.stop_strings = None
    bound["stop_strings"] = bound["stop_strings"] or model.generation_config.stop_strings
    with _compat.without_stop_strings(model):
        return model.generate(**inputs, custom_generate=decoding.bind(**bound))


def decode(
    decoding: "Decoding",
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    generator: Generators = None,
    **model_kwargs: Any,
) -> LanguageModelOutput | torch.Tensor:
    """
    Serves what transformers has prepared for one call of `generate`.

    Args:
        decoding: fits the model.
        model: a language model.
        input_ids: (batch, length) int64, without columns where the prompt is `inputs_embeds`.
        logits_processor, stopping_criteria, generation_config: complete.
        streamer, generator: see [`BoundDecoding`].
        model_kwargs: `attention_mask`, `inputs_embeds` and what else the first call of the model takes.

    Raises:
        ValueError: an option that has no meaning here, a decoding or model that does not fit.
    """
    from .decoding.base import Request

    if not decoding.fits(model):
        problem = _compat.why_not_decodable(model) or "the decoding is made for other models"
        raise ValueError(f"{type(model).__name__} cannot be decoded by {decoding.type_name()!r}: {problem}.")
    _refuse(generation_config, model_kwargs)
    processors, scale, unconditional = _compat.take_out_guidance(logits_processor)
    inputs = {name: value for name, value in model_kwargs.items() if name not in OWN}
    if "inputs_embeds" not in inputs:
        inputs["input_ids"] = input_ids.to(model.device)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    if generation_config._pad_token_tensor is not None:
        generation_config.pad_token_id = int(generation_config._pad_token_tensor)
    if isinstance(generator, Sequence) and len(generator) != len(input_ids):
        raise ValueError(
            f"{len(generator)} generators were given for {len(input_ids)} rows; give one for each."
        )
    result = decoding.run(
        Request(
            model=model,
            predictor=LanguageModelPredictor(model, scale, unconditional),
            inputs=inputs,
            generation_config=generation_config,
            logits_processor=processors,
            stopping_criteria=stopping_criteria,
            generator=generator,
            streamer=streamer,
            wants_details=bool(generation_config.return_dict_in_generate),
            prompt_ids=input_ids.to(model.device),
        )
    )
    if result.has_nan is not None and bool(result.has_nan):
        raise ValueError(
            f"{type(model).__name__} produced NaN: its weights are damaged, or too large for {model.dtype}; load it again, "
            "in bfloat16 or float32."
        )
    if result.best is not None:
        check_sampled(result.best)
    if streamer is not None:
        streamer.end()
    return _pack(result, input_ids, generation_config)


def _refuse(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Options of transformers that our loops cannot honour."""
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    refused = {
        "num_beams > 1": (config.num_beams or 1) > 1,
        "use_cache=False": config.use_cache is False,
        f"cache_implementation={config.cache_implementation!r}": config.cache_implementation
        not in (None, "static", "dynamic"),
        "a cache that is filled already": cache is not None and cache.get_seq_length() > 0,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "compile_config": config.compile_config is not None,
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "dola_layers": getattr(config, "dola_layers", None) is not None,
        "penalty_alpha": getattr(config, "penalty_alpha", None) is not None,
        "synced_gpus=True": bool(model_kwargs.get("synced_gpus")),
    }
    if asked := [name for name, is_asked in refused.items() if is_asked]:
        raise ValueError(f"Decodings of hf_argen do not support {', '.join(asked)}.")


def _pack(
    result: "DecodingResult", input_ids: torch.Tensor, config: GenerationConfig
) -> LanguageModelOutput | torch.Tensor:
    sequences = torch.cat([input_ids, result.sequences.to(input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    details = dict(result.details)
    per_token = {name: details.pop(name).unbind(1) for name in ("scores", "logits") if name in details}
    known = {name: value for name, value in details.items() if name == "accept_lengths"}
    return LanguageModelOutput(
        sequences=sequences, steps=result.steps, forward_calls=result.forward_calls, **per_token, **known
    )
