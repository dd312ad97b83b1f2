"""Opening the model that `--model` names."""

import difflib
import hashlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..modeling.headers import DamagedFileError, read_json
from .progress import busy

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("8bit", "4bit")
SAMPLES, SAMPLE_BYTES = 256, 4096  # of each file of weights, for its fingerprint
DIGITS = 12


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

    is_local = Path(locate(model)[0]).is_dir()  # a download has bars of its own
    with quiet(), busy("opening the model") if is_local else nullcontext():
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
        options = {"dtype": dtype} if quantize is None else _quantization(dtype, quantize)
        loaded = AutoModelForImageGeneration.from_pretrained(place, config=config, **options)
    except OSError as error:
        raise ValueError(cannot_open(place, error)) from error
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
    from ..assets import DEFAULT_MODEL, DEFAULT_NAME, default_model
    from ..auto import FAMILIES
    from ..convert import preset_named
    from ..modeling.conversion import load_presets

    if model in (None, DEFAULT_NAME):
        return str(default_model()), None
    if not model.strip():
        raise ValueError("The name of the model is empty; give a folder, or a name that 'argen list' shows.")
    path = Path(model).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise ValueError(f"{model} holds no model (it has no config.json); give a folder with one.")
        return str(path), None
    if model == DEFAULT_MODEL.name:
        return str(default_model()), None
    if (preset := preset_named(model)) is not None:
        return model, preset
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.parent.is_dir():
        return model, None
    presets = [name for family in FAMILIES.values() for name in load_presets(family.package)]
    close = difflib.get_close_matches(model, presets, n=2)
    hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    raise ValueError(
        f"There is no folder and no released checkpoint {model!r}{hint}; 'argen list' shows the checkpoints."
    )


def cannot_open(place: str, error: Exception) -> str:
    """What to tell when transformers could not open a folder or repository."""
    reason = str(error).strip().splitlines()[0]
    if Path(place).exists():
        return f"{place} cannot be opened: {reason}"
    return f"There is no folder {place!r}, and as a repository of the Hub it cannot be opened: {reason}"


def fingerprint(model: str | None, config: Any) -> str | None:
    """
    A few digits that change with the weights: of the size and of samples of each file, so that large models take no
    time; of a Hub repository its commit. `None` for a released checkpoint, which never changes.
    """
    place, preset = locate(model)
    if preset is not None:
        return None
    if not Path(place).is_dir():
        return str(getattr(config, "_commit_hash", None) or "")[:DIGITS] or None
    digest = hashlib.sha256()
    for file in sorted(Path(place).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(size * i // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:DIGITS]


def _quantization(dtype: str, quantize: str) -> dict[str, Any]:
    """Options of `from_pretrained`; the model decides what stays in full precision."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--quantize needs bitsandbytes; install it with: pip install bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports which kernels it has not found
    import torch
    from transformers import BitsAndBytesConfig

    bits: dict[str, Any] = {"load_in_8bit": True}
    if quantize == "4bit":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options = {"quantization_config": BitsAndBytesConfig(**bits)}
    return options if dtype == "auto" else {**options, "dtype": getattr(torch, dtype)}


@contextmanager
def quiet() -> Iterator[None]:
    """
    Without transformers' bar of the loading of weights and the Hub's lines about its attempts; bars of downloads only
    on a terminal.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    level, was_enabled = hub.level, transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # and those of the Hub
    if sys.stderr.isatty():
        enable_progress_bars()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
        if was_enabled:
            transformers_logging.enable_progress_bar()
