"""Every private name of transformers that this package touches, so that a new release breaks one file."""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY


def prepare_generation_config(model: GenerationMixin, given: GenerationConfig) -> GenerationConfig:
    """A copy of `given`, completed from the model's stored options and transformers' defaults."""
    return model._prepare_generation_config(given)[0]


def default_options() -> dict[str, Any]:
    """The values that transformers gives to options which nobody set."""
    return GenerationConfig._get_default_generation_params()


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
        input_ids_seq_length=1,  # there is no prompt, but for 0 it warns about prompts given as embeddings
        logits_processor=logits_processor,
        device=model.input_device,
        model_kwargs={},
    )
    return processors, model._get_stopping_criteria(config, stopping_criteria)


def tensor_parallel_group(model: PreTrainedModel) -> Any | None:
    """The processes that hold parts of one model together, as a `ProcessGroup`; `None` where each has its own."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


class _LazyContent(dict):
    """Classes registered with an Auto class, written as dotted names and imported when they are asked for."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, str):
            module, name = value.rsplit(".", 1)
            value = self[key] = getattr(importlib.import_module(module), name)
        return value

    def values(self) -> list[Any]:
        return [self[key] for key in self]

    def items(self) -> list[tuple[Any, Any]]:
        return [(key, self[key]) for key in self]


def register_lazily(auto_class: type, config_class: type[PreTrainedConfig], class_name: str) -> None:
    """
    What `auto_class.register(config_class, <the class>)` does, without importing the class.

    Args:
        auto_class: `AutoModel` or another Auto class of models, or `AutoProcessor`.
        class_name: dotted name of the class.
    """
    if auto_class is AutoProcessor:
        mapping = PROCESSOR_MAPPING
    else:
        mapping = auto_class._model_mapping
    if not isinstance(mapping._extra_content, _LazyContent):
        mapping._extra_content = _LazyContent(mapping._extra_content)
    mapping._extra_content[config_class] = class_name


class _LazyTask(dict):
    """The entry of a pipeline task whose class and default model are looked up when they are asked for."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if key == "impl" and isinstance(value, str):
            module, name = value.rsplit(".", 1)
            value = self[key] = getattr(importlib.import_module(module), name)
        elif key == "default":
            folder = str(value())
            logging.getLogger(PIPELINE_REGISTRY.__module__.rpartition(".")[0]).addFilter(
                lambda record: not (record.levelno == logging.WARNING and folder in record.getMessage())
            )
            return {"model": (folder, "main")}
        return value


def register_pipeline(
    task: str,
    class_name: str,
    model_class: type,
    input_type: str,
    default: Callable[[], Path],
) -> None:
    """
    What `PIPELINE_REGISTRY.register_pipeline` does, without importing the class.

    Args:
        task: the name that `pipeline()` takes.
        class_name: dotted name of the pipeline's class.
        model_class: opens the model, by `from_pretrained`.
        input_type: "text", "image" or "multimodal".
        default: gives the folder of the model that serves when none is named; transformers' warning that such a
            model may change is silenced, since it came with this package.
    """
    PIPELINE_REGISTRY.supported_tasks[task] = _LazyTask(
        impl=class_name, pt=(model_class,), type=input_type, default=default
    )


def from_config(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any
) -> PreTrainedModel:
    """An untrained model; takes `dtype` and `attn_implementation`, as the Auto classes do."""
    return model_class._from_config(config, **kwargs)


def keep_own_entries(config: GenerationConfig) -> None:
    """
    Lets entries that transformers does not know, such as `decoding`, survive saving and loading: it drops them from a
    generation configuration that is marked as derived from the model's.
    """
    config._from_model_config = False


@contextmanager
def without_load_report(unless: bool = False) -> Iterator[None]:
    """
    Silences the table of missing and superfluous weights that `from_pretrained` logs, for callers that judge these
    themselves; failed conversions, to which an error of transformers refers, stay.
    """

    def is_kept(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return unless or "LOAD REPORT" not in message or "CONVERSION" in message

    logger = logging.getLogger(PreTrainedModel.__module__)
    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)


class InspectedLoading:
    """Calls `inspect_checkpoint` of a model that `from_pretrained` has built, before it reads any weight."""

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if checkpoint_files is not None and state_dict is None:
            model.inspect_checkpoint(checkpoint_files, load_config.is_quantized)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
