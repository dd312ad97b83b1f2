"""The scripts as modules."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hf_argen.data.emoji import EmojiSet

SCRIPTS = Path(__file__).parents[2] / "scripts"
COUNT = 16


@pytest.fixture(scope="module")
def load_script() -> Iterator:
    """Imports a script by name; what the scripts import of each other is forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        if (SCRIPTS / f"{name}.py").is_file():
            del sys.modules[name]


@pytest.fixture(scope="module")
def emoji() -> EmojiSet:
    """The first few emoji."""
    whole = EmojiSet.load(64)
    return EmojiSet(
        whole.emoji[:COUNT], whole.images[:COUNT], whole.train[:COUNT], whole.held_out[:COUNT], whole.font
    )
