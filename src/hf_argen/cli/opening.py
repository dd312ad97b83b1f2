"""Opening the model that `--model` names."""

import difflib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..modeling.headers import DamagedFileError, read_json

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("8bit", "4bit")
QUANTIZATION_BLOCK = 64


def open_pipeline(model: str | None, dtype: str, quantize: str | None, device: str | None) -> Any:
    """
    The pipeline that draws with a model.

    Args:
        model: a folder, a released checkpoint (fetched and converted) or a Hub repository; default: the model that
            comes with the package.
        dtype: one of `DTYPES`; "auto" is that of the weights.
        quantize: `None` or one of `QUANTIZATIONS`.
        device: "cpu", "cuda", ...; default: a GPU if there is one.

    Raises:
        ValueError: there is no such model, it draws no pictures, or what it needs is not installed.
    """
    from ..pipelines.class_to_image import ClassToImagePipeline
    from ..pipelines.text_to_image import TextToImagePipeline

    with quiet():
        loaded, processor = _load(model, dtype, quantize)
    pipeline_class = TextToImagePipeline if loaded.config.condition_type == "text" else ClassToImagePipeline
    if quantize is not None:  # quantized weights stay where they were loaded
        device = None if getattr(loaded, "hf_device_map", None) else str(loaded.device)
    if device is None:
        return pipeline_class(loaded, processor=processor)
    try:
        return pipeline_class(loaded, processor=processor, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used ({str(error).splitlines()[0]}).") from error


def _load(model: str | None, dtype: str, quantize: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig

    from ..auto import AutoModelForImageGeneration, new_processor
    from ..convert import convert_original
    from ..modeling.loading import check_folder

    place, preset = locate(model)
    check_folder(place)
    if preset is not None:
        if quantize is not None:
            raise ValueError(
                f"{model} is converted on the fly; 'argen convert {model} FOLDER' first, then --model FOLDER."
            )
        converted = convert_original(preset[0].name, str(model))
        if dtype != "auto":
            converted = converted.to(getattr(torch, dtype))
        return converted, new_processor(converted.config)
    try:
        config = AutoConfig.from_pretrained(place)
        options = {"dtype": dtype} if quantize is None else _quantization(config, dtype, quantize)
        loaded = AutoModelForImageGeneration.from_pretrained(place, config=config, **options)
    except OSError as error:
        raise ValueError(f"{place} cannot be opened: {_first_line(error)}") from error
    return loaded, _processor(place)


def _processor(place: str) -> Any:
    """The processor that was saved, `None` without one; the pipeline makes one then, where that is possible."""
    from transformers import AutoProcessor

    file = Path(place) / "processor_config.json"
    try:
        if file.is_file():
            read_json(file)
        return AutoProcessor.from_pretrained(place)
    except DamagedFileError as error:
        raise ValueError(f"{file.name} of {place!r} {error}; fetch it again.") from error
    except OSError:
        return None


def locate(model: str | None) -> tuple[str, Any]:
    """
    What a name of a model means: a folder or repository, or (family, description) of a released checkpoint.

    Raises:
        ValueError: a folder that does not exist or holds no model, or a name that is none of these.
    """
    from ..assets import DEFAULT_MODEL, default_model
    from ..auto import FAMILIES
    from ..convert import preset_named
    from ..modeling.conversion import load_presets

    if model is None:
        return str(default_model()), None
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ValueError(f"{model} holds no model (it has no config.json); give a folder with one.")
        return str(path), None
    if model == DEFAULT_MODEL.name:
        return str(default_model()), None
    if (preset := preset_named(model)) is not None:
        return model, preset
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model, None
    presets = [name for family in FAMILIES.values() for name in load_presets(family.package)]
    close = difflib.get_close_matches(model, presets, n=2)
    hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    raise ValueError(
        f"There is no folder and no released checkpoint {model!r}{hint}; 'argen list' shows the checkpoints."
    )


def _quantization(config: Any, dtype: str, quantize: str) -> dict[str, Any]:
    """Options of `from_pretrained`; quantized models compute in bfloat16 unless told otherwise."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--quantize needs bitsandbytes; install it with: pip install bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every multiplication
    import torch
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    skipped = _not_quantized(config)
    if quantize == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=compute, llm_int8_skip_modules=skipped
        )
    return {"quantization_config": quantization, "dtype": compute}


def _not_quantized(config: Any) -> list[str]:
    """The head, as usual, and the small layers whose sizes the CPU kernels of bitsandbytes cannot split in blocks."""
    import torch

    from ..auto import AutoModelForImageGeneration

    with torch.device("meta"):
        model = AutoModelForImageGeneration.from_config(config)
    return ["head"] + [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (module.in_features % QUANTIZATION_BLOCK or module.out_features % QUANTIZATION_BLOCK)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
