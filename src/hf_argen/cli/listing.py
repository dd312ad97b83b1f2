"""`argen list`."""

from pathlib import Path
from typing import Any

from .tables import print_table


def list_command() -> None:
    """
    Prints families with their files' roles, the model that comes with the package, released checkpoints with their
    metrics, and decodings with their guarantees.
    """
    from ..assets import DEFAULT_MODEL, DEFAULT_NAME, has_default_model
    from ..auto import FAMILIES
    from ..generation.decoding import available
    from ..modeling.conversion import converter_of, load_presets

    families, presets = [], []
    for name, family in FAMILIES.items():
        converter = converter_of(family.package)
        roles = ", ".join([*converter.roles, *converter.containers])
        families.append((name, family.title, roles))
        for preset_name, preset in load_presets(family.package).items():
            presets.append((preset_name, preset["description"], measured(preset), licence(preset)))
    decodings = [
        (name, guarantee(cls), first_sentence(cls.__doc__ or "")) for name, cls in sorted(available().items())
    ]
    print_table("Families", ("name", "what it is", "files that argen convert takes"), families)
    if has_default_model():
        print_table(
            "In this package (what argen generate uses without --model)",
            ("name", "what it is", "licence of the weights"),
            [(DEFAULT_NAME, own_model(DEFAULT_MODEL), licence_of(DEFAULT_MODEL))],
        )
    print_table(
        "Released checkpoints (argen convert NAME OUT)",
        ("name", "what it is", "the authors' metric", "licence of the weights"),
        presets,
    )
    print_table("Decodings", ("name", "guarantee", "what it does"), decodings)


def own_model(folder: Path) -> str:
    """What a model folder holds, in a few words."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return f"{config.model_type}, draws {conditions(config)}, {picture_size(config)}"


def conditions(config: Any) -> str:
    """What a model draws from."""
    return "prompts" if config.condition_type == "text" else f"{config.num_classes} classes"


def picture_size(config: Any) -> str:
    """The size of the pictures of a model or visual tokenizer."""
    tokenizer = getattr(config, "image_tokenizer_config", None) or config
    if (size := getattr(config, "image_size", None)) is not None:
        height, width = size if isinstance(size, list) else (size, size)
        return f"{width}x{height} pixels"
    factor = tokenizer.downsampling_factor
    if tokenizer is not config:
        factor *= getattr(config, "patch_size", 1)  # of latents to a token
    height, width = (side * factor for side in config.grid_sizes[-1])
    return f"{width}x{height} pixels"


def licence_of(place: str | Path) -> str:
    """The licence that the model card in a folder states."""
    card = Path(place) / "README.md"
    if not card.is_file():
        return "not stated"
    for line in card.read_text(encoding="utf-8").splitlines()[1:]:
        if line.strip() == "---":
            break
        name, _, value = line.partition(":")
        if name.strip() in ("license", "licence"):
            return value.strip().strip("\"'")
    return "not stated"


def measured(preset: dict) -> str:
    """The published metric of a released checkpoint."""
    metric = preset["metric"]
    return f"{metric['name']} {metric['value']} ({metric['data']})" if metric else ""


def licence(preset: dict) -> str:
    """The licence of the weights of a released checkpoint."""
    return preset["licence"] or "not stated"


def guarantee(decoding: type) -> str:
    """What a decoding promises."""
    return f"{decoding.guarantee.value}{f' (bounded by {decoding.knob})' if decoding.knob else ''}"


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join(docstring.strip().split("\n\n")[0].split()).split(". ")[0].rstrip(".")
