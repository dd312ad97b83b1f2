"""Plain next-token decoding: one token after another (arXiv 2406.06525 for pictures)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..guidance import PairedLogits
from ..predictors.next_token import NextTokenPredictor
from ..sampling import draw_guided, runs_fused
from ..transcript import Transcript, choose
from ..warping import warps_alone
from .base import DecodingResult, Guarantee, Request
from .token_loop import TokenLoop


@dataclass
class NextToken(TokenLoop):
    """Draws one token from each forward call, in raster order for pictures; the plain decoding of next-token models."""

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT

    can_edit: ClassVar[bool] = True
    can_compile: ClassVar[bool] = True

    def run(self, request: Request) -> DecodingResult:
        predictor: NextTokenPredictor = request.predictor
        transcript = self.open(request)
        paired = predictor.prefill_paired(request.inputs)
        largest = torch.zeros((), device=paired.logits.device)  # of all logits, NaN where one is
        options = self.one_pass(request, transcript, paired)
        while True:
            logits = scores = None
            if options is not None and paired.strength is not None:
                tokens, log_probs = draw_guided(paired, options, request.generator)
                transcript.note(log_probs)
            else:
                logits = paired.guided()
                largest = torch.maximum(largest, logits.abs().amax())
                scores = transcript.process(logits)
                tokens = choose(scores, request.generation_config.do_sample, request.generator)
                transcript.note(scores)
            tokens = self.kept_or_drawn(request, tokens[:, 0], transcript)
            transcript.append(tokens[:, None], logits=logits, scores=scores)
            if transcript.is_done:
                finite = largest.isfinite()
                if options is not None:  # nothing but the model itself can have spoilt a draw
                    finite = finite & transcript.best.isfinite().all()
                return self.result(request, transcript, transcript.lengths[0], finite)
            paired = predictor.predict_paired(transcript.last())
            predictor.commit()

    @staticmethod
    def one_pass(request: Request, transcript: Transcript, paired: PairedLogits) -> dict[str, Any] | None:
        """
        The warpers of the request, where a kernel guides, warps and draws in one pass; `None` where it does not: on other
        devices, for greedy requests, with processors that are no plain warpers, and where logits or scores are kept.
        """
        if not request.generation_config.do_sample or transcript.keeps or not runs_fused(paired.halves()[0]):
            return None
        return warps_alone(request.logits_processor)

    @staticmethod
    def kept_or_drawn(request: Request, tokens: torch.Tensor, transcript: Transcript) -> torch.Tensor:
        """The token of the source picture where it is kept, otherwise the drawn one."""
        if request.edit is None:
            return tokens
        place = transcript.lengths[0]
        keep = request.edit.keep.flatten(1)[:, place] > 0
        return torch.where(keep, request.edit.ids[:, place], tokens)
