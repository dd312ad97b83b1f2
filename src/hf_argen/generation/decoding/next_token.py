"""Plain next-token decoding: one token after another (arXiv 2406.06525 for pictures)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..predictors.next_token import NextTokenPredictor
from ..transcript import Transcript, choose
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
        logits = predictor.prefill(request.inputs)
        finite = torch.isfinite(logits).all()
        while True:
            scores = transcript.process(logits[:, None])
            tokens = choose(scores[:, 0], request.generation_config.do_sample, request.generator)
            transcript.note(scores)
            tokens = self.kept_or_drawn(request, tokens, transcript)
            transcript.append(tokens[:, None], logits=logits[:, None], scores=scores)
            if transcript.is_done:
                return self.result(request, transcript, transcript.lengths[0], finite)
            logits = predictor.predict(transcript.last())[:, 0]
            predictor.commit()
            finite = finite & torch.isfinite(logits).all()

    @staticmethod
    def kept_or_drawn(request: Request, tokens: torch.Tensor, transcript: Transcript) -> torch.Tensor:
        """The token of the source picture where it is kept, otherwise the drawn one."""
        if request.edit is None:
            return tokens
        place = transcript.lengths[0]
        keep = request.edit.keep.flatten(1)[:, place] > 0
        return torch.where(keep, request.edit.ids[:, place], tokens)
