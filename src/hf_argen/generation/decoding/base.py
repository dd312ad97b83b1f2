"""What all decodings share: a name, a guarantee, storage in the generation configuration."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Self

import torch
from transformers import CompileConfig, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from .. import _compat
from ..predictors.base import Predictor
from ..sampling import Generators
from ..stored import Stored


class Guarantee(Enum):
    """What a decoding promises about its output."""

    EXACT = "exact"  # greedy output identical to plain decoding in float32
    EXACT_IN_DISTRIBUTION = "exact in distribution"  # samples follow the model's own distribution
    RELAXED = "relaxed"  # they do not; `knob` names the field that bounds the difference


@dataclass
class Edit:
    """
    A picture of which a part is kept while the rest is drawn anew.

    Attributes:
        ids: (batch, tokens) of the source picture.
        keep: (batch, h, w) float32 on the last grid, 1 where the source is kept.
    """

    ids: torch.Tensor
    keep: torch.Tensor


@dataclass
class Request:
    """
    Everything that a decoding needs to serve one call of `generate`.

    Attributes:
        edit: the picture to edit, if one is.
        num_steps: where to stop early; for next-token models a number of tokens.
        wants_details: whether the output has more than `sequences`.
        prompt_ids: (batch, length) what the sequences of a language model begin with.
    """

    model: Any
    predictor: Predictor
    inputs: dict[str, Any]
    generation_config: GenerationConfig
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generator: Generators = None
    streamer: BaseStreamer | None = None
    edit: Edit | None = None
    num_steps: int | None = None
    wants_details: bool = False
    prompt_ids: torch.Tensor | None = None


@dataclass
class DecodingResult:
    """
    What a decoding hands back.

    Attributes:
        sequences: (batch, tokens) generated ids, or latents.
        decodable: what the image tokenizer decodes to the pictures, when that is not `sequences`.
        steps: decoding steps taken.
        forward_calls: forward calls of the model, those of a drafter included.
        details: further fields of the output.
        is_finite: scalar bool tensor; False when the model produced NaN or infinity.
        has_nan: scalar bool tensor, whether it produced NaN, where that was looked for.
        best: (batch,) float32, of the places that were drawn the lowest of the best scores after the logits processors:
            -inf where no token was allowed, NaN where scores were; see `kernels.sample_logits.check_sampled`. Where a kernel
            draws in one pass, log probabilities of what was drawn in their place.
    """

    sequences: torch.Tensor
    decodable: torch.Tensor | None
    steps: int
    forward_calls: int
    is_finite: torch.Tensor
    details: dict[str, Any] = field(default_factory=dict)
    has_nan: torch.Tensor | None = None
    best: torch.Tensor | None = None


@dataclass
class Decoding(Stored, ABC):
    """
    Base of all decodings. A subclass is a dataclass in a file of its own; its fields are its options.

    Class attributes:
        guarantee: see [`Guarantee`].
        knob: for relaxed decodings, the option that bounds the difference.
        predictor_class: the kind of predictor that it drives; a model fits when its own is of that kind.
        can_compile: whether it takes a `compile_config`: its steps have shapes that do not depend on what is drawn.
    """

    kind: ClassVar[str] = "decoding"
    guarantee: ClassVar[Guarantee]
    knob: ClassVar[str | None] = None
    predictor_class: ClassVar[type[Predictor]]
    can_compile: ClassVar[bool] = False

    @abstractmethod
    def run(self, request: Request) -> DecodingResult:
        """Serves one request."""

    def __call__(self, model: Any, *args: Any, **inputs: Any) -> Any:
        """
        What transformers calls as `model.generate(..., custom_generate=decoding)` on a language model. Models of this
        package take `decoding=` instead.

        Raises:
            ValueError: the decoding does not fit the model, or the model is one of this package.
        """
        from ..language_model import decode

        self.check_fits(model)
        if hasattr(model, "predictor_class"):
            raise ValueError(
                f"{self.type_name()!r} goes to generate() of {type(model).__name__} as decoding=."
            )
        return decode(self, model, *args, **inputs)

    def bind(self, **bound: Any) -> Callable[..., Any]:
        """
        The decoding together with what transformers drops before it calls `custom_generate`.

        Args:
            bound: `streamer`, `tokenizer` and `stop_strings`, `generator`.
        """
        from ..language_model import BoundDecoding

        return BoundDecoding(self, **bound)

    @classmethod
    def by_name(cls, name: str | None) -> "type[Decoding]":
        from . import by_name

        return by_name(name)

    @classmethod
    def fits(cls, model: Any) -> bool:
        """Whether `model` can be decoded this way."""
        predictor_class = getattr(model, "predictor_class", None)
        return predictor_class is not None and issubclass(predictor_class, cls.predictor_class)

    def under(self, options: dict[str, Any]) -> Self:
        """This decoding, which a model has stored, for a call that names `options` of its own; these come first."""
        return self

    def check_fits(self, model: Any) -> None:
        """Refuses a model that cannot be decoded this way, with a list of the decodings that fit it."""
        from . import compatible_decodings

        if not self.fits(model):
            fitting = ", ".join(compatible_decodings(model)) or "none of ours"
            raise ValueError(
                f"{type(model).__name__} cannot be decoded by {self.type_name()!r}; it can by {fitting}."
            )

    def compile(self, predictor: Predictor, config: CompileConfig) -> None:
        """
        Makes the steps of a predictor compiled ones.

        Raises:
            ValueError: a configuration, decoding or model with which that cannot be done.
        """
        from . import available

        if not self.can_compile:
            able = ", ".join(name for name, one in sorted(available().items()) if one.can_compile)
            raise ValueError(
                f"compile_config: steps of {self.type_name()!r} are not compiled, but those of {able} are; leave it out."
            )
        model = predictor.model
        if problem := predictor.why_not_compiled() or _compat.why_not_compiled(model):
            raise ValueError(
                f"compile_config: steps of this {type(model).__name__} are not compiled, {problem}; leave it out."
            )
        predictor.compile(config)

    @classmethod
    def from_config(cls, generation_config: GenerationConfig | None) -> Self | None:
        """The decoding stored in a generation configuration, or `None`."""
        stored = getattr(generation_config, "decoding", None)
        return None if stored is None else resolve(stored)

    @classmethod
    def misfit(cls, found: str) -> str:
        return f"decoding is {found}; give an instance of a Decoding, its name or its stored dict."

    def store(self, generation_config: GenerationConfig) -> None:
        """Makes this the decoding that a model with this generation configuration uses, also after saving."""
        generation_config.decoding = self.to_dict()
        _compat.keep_own_entries(generation_config)


def resolve(decoding: "Decoding | dict[str, Any] | str") -> Decoding:
    """A decoding from what users write; see `Stored.resolve`."""
    return Decoding.resolve(decoding)
