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


def check_norm_groups(config: Any, multipliers: Iterable[int]) -> None:
    """Refuses levels, `base_channels` times each multiplier wide, that `norm_num_groups` does not divide."""
    for multiplier in multipliers:
        if (config.base_channels * multiplier) % config.norm_num_groups:
            raise ValueError(
                f"norm_num_groups={config.norm_num_groups} does not divide the width "
                f"{config.base_channels * multiplier} (base_channels={config.base_channels} times {multiplier})."
            )


def complete_condition(config: Any) -> None:
    """
    Checks `condition_type` of a configuration, and takes `text_embed_dim` from its text encoder where it is not given.

    Raises:
        ValueError: an unknown type, or text of unknown width.
    """
    if config.condition_type not in ("class", "text"):
        raise ValueError(f"condition_type is {config.condition_type!r}; it must be 'class' or 'text'.")
    if config.condition_type == "text" and config.text_embed_dim is None:
        if config.text_encoder_config is None:
            raise ValueError("A text-conditional model needs text_embed_dim or text_encoder_config.")
        config.text_embed_dim = config.text_encoder_config.hidden_size
