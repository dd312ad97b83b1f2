"""Every private name of transformers that this package touches, so that a new release breaks one file."""

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
    initialization,
)
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY


def prepare_generation_config(model: GenerationMixin, given: GenerationConfig) -> GenerationConfig:
    """A copy of `given`, completed from the model's stored options and transformers' defaults."""
    return model._prepare_generation_config(given)[0]


def attention_implementation(config: PreTrainedConfig) -> str:
    """`config._attn_implementation`, past the lookups of a configuration, which weigh in every layer of every token."""
    if torch.compiler.is_compiling():  # which does not know the other way
        return config._attn_implementation
    return object.__getattribute__(config, "_attn_implementation_internal")


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


def why_not_compiled(model: PreTrainedModel) -> str | None:
    """What keeps the passes of a model from being compiled in one graph; `None` if nothing does."""
    if tensor_parallel_group(model) is not None:
        return "it is split by tensor parallelism"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantization cannot be compiled"
    return None


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


class WholeInitialization:
    """
    Lets `_init_weights` see every module. transformers takes classes outside of its package for remote code that may not
    mark what it loads, and passes over modules without weights of their own (5.17 to 5.24), which would leave the
    weights below them as their children's rule had them.
    """

    @torch.no_grad()
    @initialization.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        def visit(module: torch.nn.Module, initialize: Callable[[torch.nn.Module], None]) -> None:
            for child in module.children():
                visit(child, child._initialize_weights if isinstance(child, PreTrainedModel) else initialize)
            initialize(module)

        visit(self, self._initialize_weights)


# Language models of transformers

PLAIN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
INTERNAL_MASKS = ("gpt_neo",)  # their attention reads positions off the columns of the cache


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the language model, which a model of several modalities nests."""
    return model.config.get_text_config(decoder=True)


def load_like(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Another model of the kind of `model` from a folder or the Hub, in its dtype and on its device."""
    is_own = hasattr(model, "predictor_class")
    loaded = (type(model) if is_own else AutoModelForCausalLM).from_pretrained(name, dtype=model.dtype)
    return loaded.to(model.device).eval()


def takes_argument(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's forward pass has this argument."""
    return name in _arguments(type(model))


@cache
def _arguments(model_class: type) -> frozenset[str]:
    """Of the forward pass of a class; asking Python for them takes longer than a small model's step."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which the forward pass takes its cache; it changed in transformers 5.24."""
    return "cache" if takes_argument(model, "cache") else "past_key_values"


def is_language_model(model: Any) -> bool:
    """Whether `model` is a decoder-only language model of transformers that we can decode."""
    return (
        isinstance(model, PreTrainedModel)
        and isinstance(model, GenerationMixin)
        and why_not_decodable(model) is None
    )


def why_not_decodable(model: PreTrainedModel) -> str | None:
    """What keeps a language model from being decoded with a cache of ours; `None` if nothing does."""
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if not (takes_argument(model, "cache") or takes_argument(model, "past_key_values")):
        return "its forward pass takes no key-value cache"
    if not takes_argument(model, "position_ids"):
        return "its forward pass takes no position_ids"
    config = text_config(model)
    foreign = set(getattr(config, "layer_types", None) or ()) - PLAIN_LAYERS
    if foreign or model._is_stateful:
        return f"its state ({', '.join(sorted(foreign)) or 'recurrent layers'}) cannot be rolled back"
    if getattr(config, "alibi", False):
        return "it has ALiBi positions, which take no position_ids"
    return None


def why_not_drafting(model: PreTrainedModel) -> str | None:
    """What keeps a model, of ours or of transformers, from drafting for another; `None` if nothing does."""
    return None if hasattr(model, "predictor_class") else why_not_decodable(model)


def why_no_own_masks(model: PreTrainedModel) -> str | None:
    """What keeps a language model from being fed with attention masks of ours; `None` if nothing does."""
    implementation = text_config(model)._attn_implementation
    if implementation not in ("eager", "sdpa"):
        return (
            f"attn_implementation={implementation!r} takes no attention mask of ours, which rows of unequal length "
            "and trees need; load the model with attn_implementation='sdpa'."
        )
    if text_config(model).model_type in INTERNAL_MASKS:
        return f"{type(model).__name__} masks inside its layers, so its rows cannot be of unequal length; use batch 1."
    return None


def attention_patterns(model: PreTrainedModel) -> dict[str, tuple[int | None, int | None]]:
    """For each kind of layer (one kind: all the same) its sliding window and chunk length, `None` for no limit."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"all": (window, chunk if window is None else None)}
    limits = {
        "full_attention": (None, None),
        "sliding_attention": (window, None),
        "chunked_attention": (None, chunk),
    }
    return {kind: limits[kind] for kind in sorted(set(kinds))}


def take_out_guidance(
    processors: LogitsProcessorList,
) -> tuple[LogitsProcessorList, float, dict[str, torch.Tensor]]:
    """
    The processors without that of guidance, its scale (1 without one), and its unconditional inputs as far as given.

    Raises:
        ValueError: other processors come before it, so that guidance would have to be computed on their output.
    """
    kept = LogitsProcessorList()
    scale, inputs = 1.0, {}
    for processor in processors:
        if (
            isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
            and processor.guidance_scale != 1
        ):
            if kept:
                raise ValueError(
                    f"Guidance comes after {type(kept[-1]).__name__} in the list of logits processors; put it first."
                )
            scale = processor.guidance_scale
            context = processor.unconditional_context
            names = ("input_ids", "attention_mask")
            inputs = {name: context[name] for name in names if context[name] is not None}
        else:
            kept.append(processor)
    return kept, scale, inputs


@contextmanager
def without_stop_strings(model: GenerationMixin) -> Iterator[None]:
    """Lets `generate` run although it gets no tokenizer, for which the model's own stop strings would ask."""
    kept = model.generation_config.stop_strings
    model.generation_config.stop_strings = None
    try:
        yield
    finally:
        model.generation_config.stop_strings = kept
