"""`argen list`."""

from .tables import print_table


def list_command() -> None:
    """Prints families with their files' roles, released checkpoints with their metrics, and decodings."""
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
    print_table(
        "Released checkpoints (argen convert NAME OUT)",
        ("name", "what it is", "the authors' metric", "licence of the weights"),
        presets,
    )
    print_table("Decodings", ("name", "guarantee", "what it does"), decodings)


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
