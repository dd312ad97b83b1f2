"""The heads of continuous tokens by name, as configurations describe them."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from .continuous import ContinuousHead
from .diffusion import DiffusionHead
from .energy import EnergyHead
from .flow import FlowHead
from .mixture import MixtureHead
from .shortcut import ShortcutHead

HEADS: dict[str, type[ContinuousHead]] = {
    head.head_type: head for head in (DiffusionHead, FlowHead, ShortcutHead, MixtureHead, EnergyHead)
}


def build_head(description: Mapping[str, Any], token_size: int, hidden_size: int) -> ContinuousHead:
    """
    The head that a configuration describes.

    Args:
        description: its name as `type`, and its options.
        token_size, hidden_size: see [`ContinuousHead`].

    Raises:
        ValueError: unknown name or option, or a value out of range.
    """
    options = dict(description)
    name = options.pop("type", None)
    if name not in HEADS:
        close = difflib.get_close_matches(str(name), HEADS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"head_config has the type {name!r}{hint}; there are {', '.join(HEADS)}.")
    known = [*inspect.signature(HEADS[name]).parameters][2:]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(
            f"A {name} head has no option {', '.join(unknown)}; its options are {', '.join(known)}."
        )
    return HEADS[name](token_size, hidden_size, **options)
