"""What the decodings of next-token models share: opening and closing a request."""

from typing import Any, ClassVar

import torch
from transformers.generation import BaseStreamer

from .. import _compat
from ..predictors.next_token import NextTokenPredictor
from ..transcript import Transcript
from .base import Decoding, DecodingResult, Request


class TokenLoop(Decoding):
    """
    Base of the decodings that draw tokens one after another.

    Class attributes:
        can_edit: whether it can keep a part of a source picture.
        fits_language_models: whether it decodes language models of transformers, too.
    """

    predictor_class: ClassVar[type[NextTokenPredictor]] = NextTokenPredictor
    can_edit: ClassVar[bool] = False
    fits_language_models: ClassVar[bool] = True

    @classmethod
    def fits(cls, model: Any) -> bool:
        if getattr(model, "predictor_class", None) is not None:
            return super().fits(model)
        return cls.fits_language_models and _compat.is_language_model(model)

    @property
    def largest_draft(self) -> int:
        """Tokens that are fed in one call, at most."""
        return 1

    def check(self, request: Request) -> None:
        """Refuses what cannot be honoured, before anything is computed."""
        if request.edit is not None and not self.can_edit:
            raise ValueError(
                f"{type(self).__name__} cannot keep a part of a source picture; use decoding='next_token'."
            )

    def open(self, request: Request) -> Transcript:
        """Checks the request, makes room in the predictor's cache, and gives the empty transcript."""
        self.check(request)
        config, predictor = request.generation_config, request.predictor
        prompt = request.prompt_ids
        if prompt is None:
            limit = request.num_steps or predictor.num_tokens
            prompt = torch.zeros(
                _rows(request.inputs), 0, dtype=torch.long, device=request.model.input_device
            )
            streamer: Any = request.streamer and PictureStreamer(request.model, request.streamer)
            pad = 0
        else:
            limit, streamer = config.max_length - prompt.shape[1], request.streamer
            pad = config.pad_token_id if config.pad_token_id is not None else 0
        predictor.reserve(limit + self.largest_draft, config.cache_implementation == "static")
        if self.can_compile and config.compile_config is not None:
            predictor.compile_for(self.largest_draft)
        asked = {"logits": config.output_logits, "scores": config.output_scores}
        return Transcript(
            prompt=prompt,
            logits_processor=request.logits_processor,
            stopping_criteria=request.stopping_criteria,
            limit=limit,
            pad_token_id=pad,
            streamer=streamer,
            keeps=[name for name, wanted in asked.items() if wanted and request.wants_details],
            goes_along=self.largest_draft == 1,
        )

    def result(
        self,
        request: Request,
        transcript: Transcript,
        steps: int,
        is_finite: torch.Tensor,
        calls: int | None = None,
        **details: Any,
    ) -> DecodingResult:
        """Packs what was generated."""
        for name in transcript.keeps:
            details[name] = transcript.stacked(name)
        return DecodingResult(
            sequences=transcript.sequences(),
            decodable=None,
            steps=steps,
            forward_calls=request.predictor.calls if calls is None else calls,
            is_finite=is_finite,
            details=details,
            best=transcript.best,
        )


class PictureStreamer(BaseStreamer):
    """
    Hears tokens and tells another streamer what the pictures look like after every row of them: (batch, channels,
    height, width) in [0, 1], grey where nothing is drawn yet.
    """

    def __init__(self, model: Any, streamer: BaseStreamer):
        self.model, self.streamer = model, streamer
        self.height, self.width = model.config.grid_sizes[-1]
        self.columns: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.columns.append(value)
        if len(self.columns) % self.width == 0:
            ids = torch.stack(self.columns, dim=1).to(self.model.input_device)
            self.streamer.put(self.model.decode_partly(ids))

    def end(self) -> None:
        self.streamer.end()


PROBATION = 16  # calls before a request may give up drafting


def check_give_up_below(give_up_below: float | None) -> None:
    """Refuses a bound that no request can meet or miss."""
    if give_up_below is not None and give_up_below < 1:
        raise ValueError(f"give_up_below is {give_up_below}; every call gains at least 1 token.")


def drafting_loses(gains: list[list[int]], give_up_below: float | None) -> bool:
    """Whether after the first calls the rows have gained fewer tokens a call than the bound; `gains` is [call][row]."""
    if give_up_below is None or len(gains) < PROBATION:
        return False
    gained = [gain for call in gains for gain in call if gain]
    return sum(gained) < give_up_below * len(gained)


def _rows(inputs: dict[str, Any]) -> int:
    return next(len(value) if isinstance(value, torch.Tensor) else value for value in inputs.values())
