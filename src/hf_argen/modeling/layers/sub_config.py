"""Configurations within configurations."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


def as_config(value: Any, default: type[PreTrainedConfig] | None = None) -> PreTrainedConfig | None:
    """A sub-configuration from what config.json holds: a dict names its class by `model_type`."""
    if value is None or isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"A sub-configuration is {value!r}; give a configuration or its dict.")
    value = dict(value)
    model_type = value.pop("model_type", default.model_type if default else None)
    if model_type is None:
        raise ValueError(f"The sub-configuration {value} names no model_type.")
    return AutoConfig.for_model(model_type, **value)
