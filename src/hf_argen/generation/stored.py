"""Dataclasses that are stored as plain dicts: decodings and their exchangeable parts."""

import dataclasses
import importlib
import re
from typing import Any, ClassVar, Self

import torch

_LAZY: dict[tuple[str, str], str] = {}


def offer_lazily(kind: str, name: str, class_name: str) -> None:
    """Makes a part known by name whose module is imported when it is asked for; `class_name` is dotted."""
    _LAZY[kind, name] = class_name


class Stored:
    """
    A dataclass whose stored form is its type and those options that differ from their defaults; plain JSON values.

    Class attributes:
        kind: what messages call it.
    """

    kind: ClassVar[str]

    @classmethod
    def by_name(cls, name: str | None) -> type[Self]:
        """The class of this kind with a name; a ValueError for an unknown one."""
        raise NotImplementedError

    @classmethod
    def type_name(cls) -> str:
        """The name under which it is asked for and stored: the class name in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def to_dict(self) -> dict[str, Any]:
        """The stored form: the type and those options that differ from their defaults; plain JSON values."""
        options = {
            f.name: self._stored(f.name, getattr(self, f.name))
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != (f.default_factory() if callable(f.default_factory) else f.default)
        }
        return {"type": self.type_name(), **options}

    def _stored(self, name: str, value: Any) -> Any:
        """The plain form of an option; a model is referenced by name."""
        if isinstance(value, torch.nn.Module):
            if not value.name_or_path:
                raise ValueError(
                    f"The {name} was never saved or loaded; save it first, a decoding is stored by name."
                )
            return value.name_or_path
        if isinstance(value, Stored):
            return value.to_dict()
        return [self._stored(name, one) for one in value] if isinstance(value, list | tuple) else value

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Self:
        """
        What `to_dict` wrote.

        Raises:
            ValueError: no type, or unknown type or option.
        """
        options = dict(stored)
        if "type" not in options:
            raise ValueError(f'A stored {cls.kind} has its name under "type"; {stored} has none.')
        found = cls.by_name(options.pop("type"))
        known = [f.name for f in dataclasses.fields(found)]
        if unknown := [name for name in options if name not in known]:
            raise ValueError(
                f"{found.__name__} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}."
            )
        return found(**options)

    @classmethod
    def resolve(cls, given: "Self | dict[str, Any] | str") -> Self:
        """
        One from what users write: an instance, its stored dict or its name.

        Raises:
            ValueError: unknown name or option.
            TypeError: none of these.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls.from_dict({"type": given})
        if isinstance(given, dict):
            return cls.from_dict(given)
        raise TypeError(cls.misfit(repr(given) if isinstance(given, type) else f"a {type(given).__name__}"))

    @classmethod
    def misfit(cls, found: str) -> str:
        """What to say of something that is none of this kind."""
        raise NotImplementedError


class Part(Stored):
    """
    An exchangeable part of a decoding. A kind of part is a direct subclass; its own subclasses are found by name.

    Class attributes:
        is_offered: whether it is; not what only a decoding of its own makes.
    """

    is_offered: ClassVar[bool] = True

    @classmethod
    def known(cls) -> dict[str, type[Self]]:
        """All parts of this kind by name."""
        for (kind, _), class_name in _LAZY.items():
            if kind == cls.kind:
                importlib.import_module(class_name.rpartition(".")[0])

        def below(parent: type[Self]) -> list[type[Self]]:
            return [one for child in parent.__subclasses__() for one in (child, *below(child))]

        offered = [
            one for one in below(cls) if one.is_offered and not getattr(one, "__abstractmethods__", None)
        ]
        return {one.type_name(): one for one in offered}

    @classmethod
    def by_name(cls, name: str | None) -> type[Self]:
        known = cls.known()
        if name not in known:
            raise ValueError(f"There is no {cls.kind} {name!r}; known are {', '.join(sorted(known))}.")
        return known[name]

    @classmethod
    def misfit(cls, found: str) -> str:
        return f"The {cls.kind} is {found}; give one of {', '.join(sorted(cls.known()))}."
