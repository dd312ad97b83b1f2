"""Every private name of transformers that this package touches, so that a new release breaks one file."""

from typing import Any

from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList


def prepare_generation_config(
    model: GenerationMixin, generation_config: GenerationConfig | None, options: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """A copy of the options in force, and those of `options` that are no generation option."""
    return model._prepare_generation_config(generation_config, **options)


def prepare_processors(
    model: GenerationMixin,
    config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    """The logits processors and stopping criteria that `config` asks for, merged with the user's."""
    config._eos_token_tensor = None  # pictures have a fixed number of tokens and no end token
    config.max_length = None
    processors = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=0,
        logits_processor=logits_processor,
        device=model.device,
        model_kwargs={},
    )
    return processors, model._get_stopping_criteria(config, stopping_criteria)
