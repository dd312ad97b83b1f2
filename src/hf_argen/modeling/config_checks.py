"""Checks of configuration fields that would otherwise fail far from where they were written."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def check_positive(config: Any, names: Iterable[str]) -> None:
    """Refuses fields that are not whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def check_shares(config: Any, names: Iterable[str]) -> None:
    """Refuses fields that are not numbers in [0, 1]."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}; it must lie in [0, 1].")
