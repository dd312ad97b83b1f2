"""The checkpoint that ships with the package."""

from pathlib import Path
from typing import NoReturn

DEFAULT_MODEL = Path(__file__).parent / "emoji-var"
DEFAULT_NAME = "hf_argen/emoji-var"  # what it is called in records; no folder of a user goes by it


def has_default_model() -> bool:
    """Whether this installation holds the model."""
    return (DEFAULT_MODEL / "config.json").is_file()


def default_model() -> Path:
    """
    The folder of the model that is used when none is named.

    Raises:
        ValueError: this installation has none.
    """
    if not has_default_model():
        raise ValueError(
            "This installation of hf_argen has no model of its own; name one: --model on the command line, "
            "model= in Python."
        )
    return DEFAULT_MODEL


def no_class_model() -> NoReturn:
    """
    The counterpart for models that draw classes.

    Raises:
        ValueError: always; the package ships a model that draws from prompts only.
    """
    raise ValueError(
        "No model that draws classes comes with hf_argen; name one, for example a converted 'var-d16'."
    )
