"""Generation: predictors, decodings, guidance, sampling."""

from typing import Any

from .decoding import Decoding, Guarantee, compatible_decodings

__all__ = ["Decoding", "Guarantee", "compatible_decodings", "generate"]


def generate(model: Any, decoding: Decoding | dict[str, Any] | str | None = None, **inputs: Any) -> Any:
    """
    Generates with any decoding on any model that it fits.

    Args:
        model: a model of this package, or a language model of transformers.
        decoding: instance, name or stored dict; default: what `generation_config=` or `model.generation_config`
            stores, else plain decoding.
        inputs: everything that the model's own `generate` takes, `streamer`, `tokenizer` and `stop_strings` included,
            and on language models also `generator`: one, or one per row.

    Returns:
        What the model's own `generate` returns.

    Raises:
        ValueError: the decoding does not fit the model; the message lists those that do.
        TypeError: `model` does not generate.
    """
    from .decoding import resolve

    if getattr(model, "generation_config", None) is None:
        raise TypeError(f"{type(model).__name__} does not generate; give a model with generate().")
    if hasattr(model, "predictor_class"):
        return model.generate(decoding=decoding, **inputs)
    if decoding is None:
        configs = (inputs.get("generation_config"), model.generation_config)
        decoding = next((stored for config in configs if (stored := Decoding.from_config(config))), None)
    if decoding is None:
        return model.generate(**inputs)
    from .language_model import generate as generate_text

    chosen = resolve(decoding)
    chosen.check_fits(model)
    return generate_text(model, chosen, inputs)
