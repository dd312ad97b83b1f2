"""Decodings: which positions to predict next, and which predictions to keep. One file each."""

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from .base import Decoding, DecodingResult, Edit, Guarantee, Request, resolve

__all__ = [
    "Decoding",
    "DecodingResult",
    "Edit",
    "Guarantee",
    "Request",
    "available",
    "by_name",
    "compatible_decodings",
    "resolve",
]


@cache
def _load_all() -> None:
    """Imports every file of this folder, so that putting a file here is all it takes to add a decoding."""
    for module in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
        importlib.import_module(module.name)


def _subclasses(parent: type[Decoding]) -> list[type[Decoding]]:
    return [cls for child in parent.__subclasses__() for cls in (child, *_subclasses(child))]


def available() -> dict[str, type[Decoding]]:
    """All decodings by name, those of other packages that subclass [`Decoding`] included."""
    _load_all()
    return {cls.type_name(): cls for cls in _subclasses(Decoding) if not cls.__abstractmethods__}


def by_name(name: str | None) -> type[Decoding]:
    """
    The decoding class with this name.

    Raises:
        ValueError: unknown name; the message offers the closest ones.
    """
    known = available()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"There is no decoding {name!r}; known are {', '.join(sorted(known))}.{hint}")


def compatible_decodings(model: Any) -> list[str]:
    """Names of the decodings that fit `model`, sorted; empty for a model that we cannot decode."""
    return sorted(name for name, cls in available().items() if cls.fits(model))
