"""`argen push`."""

from pathlib import Path
from typing import Any

import typer

from ..hub import files_to_push
from ..modeling.headers import DamagedFileError, TensorHeader, read_headers, read_index
from ..storage import INDEX, WEIGHTS


def push_command(
    folder: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    pull_request: bool = False,
) -> None:
    """
    Pushes a saved model to the Hub in one commit, after a look at whether it is whole.

    Args:
        folder: what `save_pretrained` or `argen convert` wrote.
        repo_id: repository, made if there is none.
        private: make it a private one.
        revision: branch, made if there is none.
        message: of the commit.
        pull_request: open a pull request in place of committing.

    Raises:
        ValueError: the folder holds no whole model of ours, or the Hub refuses.
    """
    from transformers import GenerationConfig

    from ..modeling.cards import model_card
    from ..modeling.saving import push_with_card

    model_class, config, parameters = _checked(folder)
    try:
        options = GenerationConfig.from_pretrained(folder).to_diff_dict()
    except OSError:
        options = {}
    origin = getattr(config, "original_checkpoint", None)
    if origin and origin.get("licence_note"):
        typer.echo(f"licence of the weights: {origin['licence_note']}", err=True)
    names = files_to_push(folder)
    size = sum((folder / name).stat().st_size for name in names)
    typer.echo(f"pushing {len(names)} files, {size / 1e6:.1f} MB", err=True)
    commit = push_with_card(
        folder,
        model_card(model_class, config, options, parameters, repo_id),
        repo_id,
        private=private or None,
        revision=revision,
        commit_message=message,
        create_pr=pull_request,
    )
    typer.echo(commit.pr_url or commit.commit_url)


def _checked(folder: Path) -> tuple[Any, Any, int]:
    """Class, configuration and number of parameters of the model in a folder; an error unless it is whole."""
    from transformers import AutoConfig

    from ..auto import FAMILIES
    from ..modeling.loading import check_depth, check_fit, check_folder

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model (it has no config.json); give a folder with one.")
    variants = sorted({variant for name in files_to_push(folder) if (variant := _variant(name)) is not None})
    if not variants:
        raise ValueError(f"{folder} holds no weights; save the model there first.")
    for variant in variants:
        check_folder(folder, variant or None)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"{folder} is a model of type {config.model_type!r}; hf_argen has {', '.join(FAMILIES)}."
        )
    check_depth(config.to_dict(), folder)
    model_class = family.load(family.generator or family.base_model)
    counts = []
    for variant in variants:
        headers = _headers(folder, variant)
        check_fit(model_class, config, headers, folder)
        counts.append(sum(header.elements for header in headers.values()))
    return model_class, config, counts[0]


def _variant(name: str) -> str | None:
    """The variant of a file of weights, "" for the plain one; `None` for another file."""
    found = WEIGHTS.fullmatch(name) or INDEX.fullmatch(name)
    return None if found is None or found["stem"] != "model" else found["variant"] or ""


def _headers(folder: Path, variant: str) -> dict[str, TensorHeader]:
    dot = f".{variant}" if variant else ""
    index = folder / f"model.safetensors.index{dot}.json"
    names = read_index(index) if index.is_file() else [f"model{dot}.safetensors"]
    try:
        return read_headers(folder / name for name in names)
    except (DamagedFileError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is not whole ({error}); save the model again.") from error
