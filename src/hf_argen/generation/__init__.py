"""Generation: predictors, decodings, guidance, sampling."""

from typing import Any

from .decoding import Decoding, Guarantee, compatible_decodings

__all__ = ["Decoding", "Guarantee", "compatible_decodings", "generate"]


def generate(model: Any, decoding: Decoding | dict[str, Any] | str | None = None, **inputs: Any) -> Any:
    """
    Generates with any decoding on any model that it fits.

    Args:
        model: a model of this package, or a language model of transformers.
        decoding: instance, name or stored dict; default: what `model.generation_config` stores, else plain decoding.
        inputs: everything that the model's own `generate` takes.

    Returns:
        What the model's own `generate` returns.

    Raises:
        ValueError: the decoding does not fit the model; the message lists those that do.
    """
    from .decoding import resolve

    if hasattr(model, "predictor_class"):
        return model.generate(decoding=decoding, **inputs)
    chosen = resolve(decoding) if decoding is not None else Decoding.from_config(model.generation_config)
    if chosen is None:
        return model.generate(**inputs)
    fitting = ", ".join(compatible_decodings(model)) or "none of ours"
    raise ValueError(
        f"{type(model).__name__} cannot be decoded by {chosen.type_name()!r}; it can by {fitting}."
    )
