"""`argen convert`."""

import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ..storage import clear_remains, replaced_folder


def convert_command(
    source: str, out: Path, file: Sequence[str], config: Sequence[str], force: bool = False
) -> None:
    """
    Converts and writes a folder; `out` appears complete or not at all.

    Args:
        source: name of a preset or family.
        out: folder to write.
        file: `role=path` each.
        config: `role.key=value` each, or a JSON file of role -> arguments; later ones win.
        force: replace a folder that holds something.

    Raises:
        ValueError: bad input.
    """
    from ..auto import FAMILIES
    from ..convert import convert_original, preset_named
    from ..modeling.conversion import load_presets

    clear_remains(out)
    _check_out(out, force)
    preset = preset_named(source)
    if preset is None and source not in FAMILIES:
        known = [*FAMILIES, *(name for family in FAMILIES.values() for name in load_presets(family.package))]
        close = difflib.get_close_matches(source, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"{source!r} is neither a released checkpoint nor a family{hint}; 'argen list' shows them."
        )
    with _progress(f"{'fetching and converting' if preset else 'converting'} {source}"):
        if preset is not None:
            if file or config:
                raise ValueError(f"{source} is a preset and brings its own files; use --file with a family.")
            model = convert_original(preset[0].name, source)
        else:
            model = convert_original(source, dict(_pair(item, "--file") for item in file), _arguments(config))
    with _progress(f"writing {out}"):
        _write(model, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    typer.echo(f"{out}: {type(model).__name__}, {parameters / 1e6:.1f} million parameters")


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder.")
    if out.exists() and any(out.iterdir()) and not force:
        raise ValueError(f"{out} is not empty; give another folder, or --force to replace it.")


def _pair(item: str, option: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{option} {item!r} is not of the form NAME=VALUE.")
    return name, value


def _arguments(items: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The `--config` options as role -> constructor arguments."""
    arguments: dict[str, dict[str, Any]] = {}
    for item in items:
        if "=" not in item:
            loaded = _read_json(Path(item))
        else:
            place, value = _pair(item, "--config")
            role, dot, key = place.partition(".")
            if not (role and dot and key):
                raise ValueError(f"--config {item!r} is neither ROLE.KEY=VALUE nor a JSON file.")
            loaded = {role: {key: _value(value)}}
        for role, values in loaded.items():
            arguments.setdefault(role, {}).update(values)
    return arguments


def _read_json(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"--config {str(path)!r} is neither ROLE.KEY=VALUE nor an existing JSON file.")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config {str(path)!r} is not JSON ({error}).") from error
    if not isinstance(loaded, dict) or not all(isinstance(values, dict) for values in loaded.values()):
        raise ValueError(f"--config {str(path)!r} must map roles to dicts of arguments.")
    return loaded


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _write(model: Any, out: Path) -> None:
    """Writes model and processor; an interruption leaves `out` as it was."""
    from ..auto import new_processor

    processor = new_processor(model.config)
    with replaced_folder(out) as folder:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)


@contextmanager
def _progress(message: str) -> Iterator[None]:
    """A spinner on a terminal, a line elsewhere."""
    from rich.console import Console

    console = Console(file=sys.stderr, highlight=False)
    if console.is_terminal:
        with console.status(message):
            yield
    else:
        typer.echo(message, err=True)
        yield
