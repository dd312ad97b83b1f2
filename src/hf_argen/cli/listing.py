"""`argen list`."""

from collections.abc import Iterable

import typer


def list_command() -> None:
    """Prints families with their files' roles, released checkpoints with their metrics, and decodings."""
    from ..auto import FAMILIES
    from ..generation.decoding import available
    from ..modeling.conversion import converter_of, load_presets

    families, presets = [], []
    for name, family in FAMILIES.items():
        converter = converter_of(family.package)
        roles = ", ".join([*converter.roles, *converter.containers])
        families.append((name, family.title, f"files: {roles}"))
        for preset_name, preset in load_presets(family.package).items():
            metric = preset["metric"]
            measured = f"{metric['name']} {metric['value']} ({metric['data']})" if metric else ""
            presets.append((preset_name, preset["description"], measured))
    decodings = [
        (name, f"{cls.guarantee.value}{f' (bounded by {cls.knob})' if cls.knob else ''}")
        for name, cls in sorted(available().items())
    ]
    _print("Families", families)
    _print("Released checkpoints, with the authors' metrics (argen convert NAME OUT)", presets)
    _print("Decodings, with what each promises", decodings)


def _print(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    typer.echo(title)
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(f"  {'  '.join(cells).rstrip()}")
