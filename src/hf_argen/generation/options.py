"""The options of one call of `generate()`: which of them win, and what is refused."""

import difflib
import inspect
import math
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig

from . import _compat
from .compilation import check_compile_config

# Fields of transformers' GenerationConfig that mean something to a model without prompt tokens and end token.
SUPPORTED = frozenset(
    [
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "sequence_bias",
        "renormalize_logits",
        "guidance_scale",
        "num_return_sequences",
        "max_new_tokens",
        "max_length",
        "max_time",
        "use_cache",
        "cache_implementation",
        "compile_config",
        "disable_compile",
        "output_logits",
        "return_dict_in_generate",
        "pad_token_id",
        "bos_token_id",
    ]
)
NOT_SUPPORTED = frozenset(vars(GenerationConfig())) - SUPPORTED


def prepare_options(
    model: Any, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig:
    """
    A copy of the options in force: those of the call over those of `generation_config` over the model's stored ones.

    Raises:
        ValueError: an unknown keyword, an option that cannot be honoured, a value out of range.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"generation_config is a {type(generation_config).__name__}; give a GenerationConfig, or its options by name."
        )
    _check_names(model, kwargs)
    call = {name: value for name, value in kwargs.items() if value is not None}
    if generation_config is not None:
        call = _set_options(generation_config) | call
    stored = _set_options(model.generation_config)
    asked = stored | call
    check_values(asked, math.inf if model.clips_top_k else getattr(model.config, "vocab_size", None))
    if asked.get("compile_config") is not None:
        check_compile_config(asked["compile_config"])
    stored.pop(
        "eos_token_id", None
    )  # harmless where a model happens to store it; asked for, it must not be ignored
    _refuse(model, stored | call)
    # transformers refuses several sequences without sampling; here they may differ by the classes that are drawn.
    count = call.pop("num_return_sequences", None) or stored.get("num_return_sequences", 1)
    given = GenerationConfig()
    given.update(**call, allow_custom_entries=True)
    config = _compat.prepare_generation_config(model, given)
    config.num_return_sequences = count
    if config.max_new_tokens is None:
        config.max_new_tokens = asked.get("max_length")  # the same where there is no prompt
    if config.top_p == 0:
        config.top_p = 1.0
    if "top_k" not in asked:
        config.top_k = 0  # transformers' default of 50 is meant for text
    return config


def _set_options(config: GenerationConfig) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(config).items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }


def _check_names(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuses keywords that neither `generate` nor a generation configuration has."""
    known = [*inspect.signature(model.generate).parameters, *vars(GenerationConfig())]
    known += vars(model.generation_config)  # entries of ours, such as `guidance_schedule`
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, [one for one in known if one not in NOT_SUPPORTED], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"generate() of {type(model).__name__} has no keyword {name!r}.{hint}")


def _refuse(model: Any, asked: dict[str, Any]) -> None:
    """Options of transformers that have no meaning here, unless they are off."""
    defaults = _compat.default_options()
    names = [
        name
        for name, value in asked.items()
        if name in NOT_SUPPORTED and value not in (False, 0, "", []) and value != defaults.get(name)
    ]
    if asked.get("use_cache") is False:
        names.append("use_cache=False")
    if asked.get("cache_implementation", "dynamic") not in ("dynamic", "static"):
        names.append(f"cache_implementation={asked['cache_implementation']!r}")
    if names:
        raise ValueError(f"generate() of {type(model).__name__} does not support {', '.join(names)}.")


def check_values(options: dict[str, Any], vocab_size: float | None) -> None:
    """
    Ranges that transformers clamps silently, or that would only be noticed in the middle of the work.

    Args:
        options: by name; those that are missing or `None` are not checked.
        vocab_size: codes to draw from, infinite where a larger `top_k` means all of them; `None` for models that draw none.
    """
    checks: dict[str, tuple[str, Any]] = {
        "temperature": (
            "be a number above 0 (do_sample=False takes the best token)",
            lambda value: value > 0,
        ),
        "guidance_scale": (
            "be a finite number, 0 (no guidance) or above",
            lambda value: 0 <= value < math.inf,
        ),
        "top_p": ("lie in [0, 1], 0 and 1 are off", lambda value: 0 <= value <= 1),
        "num_return_sequences": (
            "be a whole number of at least 1",
            lambda value: isinstance(value, Integral) and value >= 1,
        ),
    }
    if vocab_size is not None:
        checks["top_k"] = (
            f"lie in [0, {vocab_size}], 0 is off",
            lambda value: isinstance(value, Integral) and 0 <= value <= vocab_size,
        )
    for name, (rule, holds) in checks.items():
        value = options.get(name)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not (is_number and holds(value)):
            raise ValueError(f"{name} is {value!r}; it must {rule}.")
