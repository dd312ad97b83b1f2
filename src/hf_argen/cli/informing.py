"""`argen info`."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..modeling.headers import DamagedFileError, read_header
from .files import FORMATS, read_record
from .listing import conditions, guarantee, licence, licence_of, measured, picture_size
from .opening import cannot_open, locate, quiet
from .request import DrawRequest
from .tables import print_facts

RECIPE = ("do_sample", "guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p", "decoding")


def info_command(source: str | None) -> None:
    """
    Prints what a model is, or how a picture was made.

    Args:
        source: a model, see [`locate`], or a picture; default: the model that comes with the package.

    Raises:
        ValueError: neither of both.
    """
    if source is not None and (Path(source).is_file() or Path(source).suffix.lower() in FORMATS):
        print_facts(_picture(Path(source)))
        return
    place, preset = locate(source)
    print_facts(_preset(*preset) if preset is not None else _model(place))


def _picture(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a picture that argen generate wrote, or a model.")
    record = read_record(path)
    request = DrawRequest.from_record(record)
    for name, value in record.items():
        if not isinstance(value, dict):
            yield name, "; ".join(value) if isinstance(value, list) else str(value)
    yield "command", request.command()
    yield "again", shlex.join(["argen", "generate", "--again", str(path)])


def _preset(family: Any, preset: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "checkpoint", preset["description"]
    yield "family", f"{family.name}, {family.title}"
    for role, file in preset["files"].items():
        yield role, f"{file['repository']}: {file['file']}"
    yield "recipe", _recipe(preset.get("generation_config", {}))
    yield "metric", measured(preset) or "none published"
    yield (
        "licence",
        f"{licence(preset)}; {preset['licence_note']}" if preset.get("licence_note") else licence(preset),
    )
    yield "decodings", _decodings(family)


def _model(place: str) -> Iterator[tuple[str, str]]:
    from transformers import AutoConfig

    from ..auto import FAMILIES

    try:
        with quiet():
            config = AutoConfig.from_pretrained(place)
    except (OSError, KeyError) as error:
        raise ValueError(cannot_open(place, error)) from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"{place} is a model of type {config.model_type!r}; hf_argen has {', '.join(FAMILIES)}."
        )
    yield "model", place
    yield "family", f"{family.name}, {family.title}"
    yield "parameters", _parameters(place)
    yield from _sizes(config)
    yield "recipe", _recipe(_generation_config(place))
    yield "licence", licence_of(place)
    if family.generator is not None:
        yield "decodings", _decodings(family)


def _sizes(config: Any) -> Iterator[tuple[str, str]]:
    """Tokens, scales and what the model draws from."""
    if grids := getattr(config, "grid_sizes", None):
        yield "picture", picture_size(config)
        yield "tokens", str(sum(height * width for height, width in grids))
        yield "scales", ", ".join(f"{height}x{width}" for height, width in grids)
    if codes := getattr(config, "vocab_size", None) or getattr(config, "codebook_size", None):
        yield "codes", str(codes)
    if hasattr(config, "condition_type"):
        yield "draws from", conditions(config)


def _recipe(options: dict[str, Any]) -> str:
    named = [f"{name}={options[name]}" for name in RECIPE if options.get(name) is not None]
    return ", ".join(named) or "none stored"


def _generation_config(place: str) -> dict[str, Any]:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(place).to_diff_dict()
    except OSError:
        return {}


def _decodings(family: Any) -> str:
    from ..generation.decoding import available, compatible_decodings

    if family.generator is None:
        return "none; it is a visual tokenizer"
    known = available()
    fitting = compatible_decodings(family.load(family.generator))
    return "; ".join(f"{name}, {guarantee(known[name])}" for name in fitting)


def _parameters(place: str) -> str:
    """Counted from the headers of the safetensors files; the weights themselves are not read."""
    if Path(place).is_dir():
        counts = _count(sorted(Path(place).glob("*.safetensors")))
    else:
        from huggingface_hub import get_safetensors_metadata

        counts = dict(get_safetensors_metadata(place).parameter_count)
    if not counts:
        return "unknown; there is no safetensors file"
    kinds = ", ".join(f"{count / 1e6:.2f} million {kind}" for kind, count in counts.items())
    return f"{sum(counts.values()):,} ({kinds})".replace(",", " ", f"{sum(counts.values()):,}".count(","))


def _count(files: list[Path]) -> dict[str, int]:
    """Parameters by dtype."""
    counts: dict[str, int] = {}
    for file in files:
        try:
            header = read_header(file)
        except DamagedFileError as error:
            raise ValueError(f"{file} {error}; fetch it again.") from error
        for tensor in header.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.elements
    return counts
