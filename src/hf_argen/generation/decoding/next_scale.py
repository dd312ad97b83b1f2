"""Plain next-scale decoding: scale after scale, all tokens of a scale at once (VAR, arXiv 2404.02905)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..guidance import PairedLogits
from ..predictors.next_scale import NextScalePredictor
from ..sampling import categorical, draw_guided, gumbel_softmax, runs_fused
from ..warping import warps_alone
from .base import Decoding, DecodingResult, Guarantee, Request


@dataclass
class Trace:
    """What one request has produced so far."""

    ids: list[torch.Tensor] = field(default_factory=list)
    feature_maps: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    is_finite: torch.Tensor | None = None
    best: torch.Tensor | None = None
    is_stopped: bool = False

    def note(self, best: torch.Tensor) -> None:
        """For each row the lowest of the best scores (batch,) of the places of a scale."""
        self.best = best if self.best is None else torch.minimum(self.best, best)

    def note_finite(self, is_finite: torch.Tensor) -> None:
        """Whether the logits of a scale are finite."""
        self.is_finite = is_finite if self.is_finite is None else self.is_finite & is_finite

    def sequences(self) -> torch.Tensor:
        """Ids so far, (batch, tokens)."""
        return torch.cat(self.ids, dim=1)


@dataclass
class NextScale(Decoding):
    """
    Draws all tokens of a scale from one forward call, coarse to fine.

    Args:
        smooth: replace the drawn code by a Gumbel-softmax mixture of codes whose temperature falls with the scale;
            smoother pictures, for viewing only (the authors' `more_smooth`). The ids are drawn all the same but do
            not make the picture.
        top_k: one value per scale in place of the request's; stored with a model, it gives way to that of a call.
        temperature: likewise; divides the logits after top-k and top-p, as in CoDe (arXiv 2411.17787), where the
            request's divides them before.
        edit_mode: how kept parts of a source picture enter: "tokens" puts the source's codes in place of the drawn
            ones (VAR's notebook), "features" its feature map in place of the sum (CoDe).
    """

    smooth: bool = False
    top_k: list[int] | None = None
    temperature: list[float] | None = None
    edit_mode: str = "tokens"

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    predictor_class: ClassVar[type[NextScalePredictor]] = NextScalePredictor
    can_compile: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.edit_mode not in ("tokens", "features"):
            raise ValueError(f"edit_mode is {self.edit_mode!r}; it must be 'tokens' or 'features'.")
        self.top_k = self._checked("top_k", "whole numbers, 0 or above", Integral, lambda value: value >= 0)
        self.temperature = self._checked("temperature", "numbers above 0", Real, lambda value: value > 0)

    def _checked(self, name: str, rule: str, kind: type, holds: Callable[[Any], bool]) -> list | None:
        """The values per scale as plain numbers, which JSON can store."""
        values = getattr(self, name)
        if values is None:
            return None
        if not isinstance(values, list | tuple):
            raise ValueError(f"{name} is {values!r}; give a list with one value per scale.")
        for value in values:
            if not (isinstance(value, kind) and holds(value)):
                raise ValueError(f"{name} holds {value!r}; its values must be {rule}.")
        return [int(value) if kind is Integral else float(value) for value in values]

    def under(self, options: dict[str, Any]) -> Self:
        own = [name for name in ("top_k", "temperature") if options.get(name) is not None]
        return replace(self, **dict.fromkeys(own, None))

    def run(self, request: Request) -> DecodingResult:
        self.check(request)
        predictor = request.predictor
        trace = Trace()
        paired = predictor.prefill_paired(request.inputs)
        self.decode(predictor, request, trace, paired, request.num_steps or predictor.num_scales)
        return self.result(trace, predictor, predictor.calls)

    def check(self, request: Request) -> None:
        """Refuses what cannot be honoured, before anything is computed."""
        num_scales = request.predictor.num_scales
        for name in ("top_k", "temperature"):
            values = getattr(self, name)
            if values is not None and len(values) != num_scales:
                raise ValueError(f"{name} has {len(values)} values; this model has {num_scales} scales.")
        vocab_size = request.model.config.vocab_size
        if self.top_k is not None and max(self.top_k) > vocab_size:
            raise ValueError(f"top_k holds {max(self.top_k)}; this model has {vocab_size} codes.")
        if self.smooth and not request.generation_config.do_sample:
            raise ValueError("smooth=True mixes codes by random noise; it needs do_sample=True.")

    def decode(
        self, predictor: NextScalePredictor, request: Request, trace: Trace, paired: PairedLogits, stop: int
    ) -> None:
        """Samples and commits scales from the predictor's present one up to `stop` - 1."""
        while True:
            self.commit_scale(predictor, request, trace, paired)
            if trace.is_stopped or predictor.step == stop:
                return
            paired = predictor.predict_paired()

    def commit_scale(
        self, predictor: NextScalePredictor, request: Request, trace: Trace, paired: PairedLogits
    ) -> None:
        """Draws one scale from its logits and makes it part of the picture."""
        step, logits = predictor.step, None
        options = self.one_pass(request, paired, step)
        if options is not None:
            ids, log_probs = draw_guided(paired, options, request.generator)
            trace.note_finite(log_probs.isfinite().all())  # nothing but the model can have spoilt a draw
            codes = predictor.quantizer.embed(ids)
        else:
            logits = paired.guided()
            trace.note_finite(torch.isfinite(logits).all())
            ids, codes = self.sample(predictor, request, trace, logits)
            if request.wants_details and request.generation_config.output_logits:
                trace.logits.append(logits)
        self.commit(predictor, request, codes)
        trace.ids.append(ids)
        if request.wants_details:
            trace.feature_maps.append(predictor.feature_map)
        if request.streamer is not None:
            request.streamer.put(request.model.decode_images(predictor.feature_map))
        if step + 1 < predictor.num_scales and request.stopping_criteria:
            trace.is_stopped = bool(request.stopping_criteria(trace.sequences(), logits).all())

    def one_pass(self, request: Request, paired: PairedLogits, step: int) -> dict[str, Any] | None:
        """
        The warpers of a scale, where a kernel guides, warps and draws in one pass; `None` where it does not: on other
        devices, for greedy requests, with processors that are no plain warpers, with codes that are mixed or a temperature
        that divides after top-p, in subclasses that sample otherwise, and where the logits are wanted.
        """
        config, own = request.generation_config, type(self)
        is_plain = config.do_sample and not self.smooth and self.temperature is None
        is_plain = is_plain and own.sample is NextScale.sample and own.process is NextScale.process
        wants_logits = request.stopping_criteria or (request.wants_details and config.output_logits)
        if not is_plain or wants_logits or not runs_fused(paired.halves()[0]):
            return None
        return warps_alone(self.processors(request, step))

    def sample(
        self, predictor: NextScalePredictor, request: Request, trace: Trace, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (batch, tokens) of the scale and the codes (batch, tokens, channels) that enter the picture."""
        step, num_scales = predictor.step, predictor.num_scales
        scores = self.process(request, trace, logits, step)
        trace.note(scores.amax(dim=-1).amin(dim=1))
        if not request.generation_config.do_sample:
            ids = scores.argmax(dim=-1)
            return ids, predictor.quantizer.embed(ids)
        # The temperature of a scale stays out of the mixture below, as in CoDe.
        tempered = scores if self.temperature is None else scores / self.temperature[step]
        ids = categorical(tempered.softmax(dim=-1), request.generator)
        if not self.smooth:
            return ids, predictor.quantizer.embed(ids)
        progress = step / (num_scales - 1) if num_scales > 1 else 1.0
        temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
        mixture = gumbel_softmax(scores * (1 + progress), temperature, request.generator)
        return ids, mixture @ predictor.quantizer.codebook(scores.device)

    def process(self, request: Request, trace: Trace, logits: torch.Tensor, step: int) -> torch.Tensor:
        """Logits (batch, tokens, vocab_size) through the logits processors; each sees its row's own sequence."""
        processors = self.processors(request, step)
        if not processors:
            return logits
        batch, tokens, vocab = logits.shape
        empty = torch.zeros(batch, 0, dtype=torch.long, device=logits.device)
        sequences = trace.sequences() if trace.ids else empty
        scores = processors(sequences.repeat_interleave(tokens, dim=0), logits.reshape(batch * tokens, vocab))
        return scores.view(batch, tokens, vocab)

    def processors(self, request: Request, step: int) -> LogitsProcessorList:
        """The request's processors, those replaced for which this decoding has values per scale; `sample` divides."""
        if not request.generation_config.do_sample or (self.top_k is None and self.temperature is None):
            return request.logits_processor
        config = request.generation_config
        top_k = config.top_k if self.top_k is None else self.top_k[step]
        replaced = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
        kept = [p for p in request.logits_processor if not isinstance(p, replaced)]
        warpers: list[Any] = []
        if self.temperature is None and config.temperature not in (None, 1.0):
            warpers.append(TemperatureLogitsWarper(float(config.temperature)))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if config.top_p is not None and config.top_p < 1.0:
            warpers.append(TopPLogitsWarper(config.top_p))
        return LogitsProcessorList(kept + warpers)

    def commit(self, predictor: NextScalePredictor, request: Request, codes: torch.Tensor) -> None:
        """Adds the codes of a scale to the picture, kept parts of a source picture excepted."""
        edit, step, grids = request.edit, predictor.step, predictor.grids
        if edit is None:
            predictor.commit(codes)
        elif self.edit_mode == "tokens":
            keep = keep_on_grid(edit.keep, grids[step]).flatten(1).unsqueeze(-1)
            source = predictor.quantizer.embed(predictor.quantizer.split(edit.ids, grids)[step])
            predictor.commit(source * keep + codes * (1 - keep))
        else:
            source_map = predictor.quantizer.feature_maps(edit.ids, grids)[step]
            keep = edit.keep.unsqueeze(1)
            drawn = predictor.feature_map + predictor.quantizer.contribution(codes, step, grids)
            predictor.replace_feature_map(drawn * (1 - keep) + source_map * keep)

    def result(self, trace: Trace, predictor: NextScalePredictor, forward_calls: int) -> DecodingResult:
        """Packs what was drawn; the feature map makes the picture."""
        details: dict[str, Any] = {}
        if trace.feature_maps:
            details["feature_maps"] = tuple(trace.feature_maps)
        if trace.logits:
            details["logits"] = torch.cat(trace.logits, dim=1)
        return DecodingResult(
            sequences=trace.sequences(),
            decodable=predictor.feature_map,
            steps=len(trace.ids),
            forward_calls=forward_calls,
            is_finite=trace.is_finite,
            details=details,
            best=trace.best,
        )


def keep_on_grid(keep: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    A mask (batch, h, w) at another size, (batch, *size) of 0 and 1. The coarsest grids, of up to three tokens, are
    always kept: they hold the colour and brightness that old and new parts have to share.
    """
    if size[0] * size[1] <= 3:
        return keep.new_ones(keep.shape[0], *size)
    resized = F.interpolate(keep.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
    return (resized[:, 0] > 0.5).to(keep.dtype)
