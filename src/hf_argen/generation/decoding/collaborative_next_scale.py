"""CoDe: a large model drafts the coarse scales, a small one refines the fine ones (arXiv 2411.17787)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..predictors.next_scale import NextScalePredictor
from ..sampling import categorical, rewind, snapshot
from .base import DecodingResult, Guarantee, Request
from .next_scale import NextScale, Trace


@dataclass
class CollaborativeNextScale(NextScale):
    """
    The model draws the first `draft_scales` scales; then `refiner` reads them in one pass and draws the others.

    Coarse scales hold few tokens but need a large model; fine scales hold most tokens and a small one does. Both
    need the same image tokenizer and scales.

    Args:
        refiner: the small model, its folder or its Hub repository; `None` takes the `refiner` that the model itself
            carries (CoDe's own checkpoints). Stored by name, never with its weights.
        draft_scales: scales that the model draws, at least 1 and not all; default: all but the last two.
    """

    refiner: Any = None
    draft_scales: int | None = None
    edit_mode: str = field(default="features")

    guarantee: ClassVar[Guarantee] = Guarantee.RELAXED
    knob: ClassVar[str | None] = "draft_scales"
    can_compile: ClassVar[bool] = False

    def check(self, request: Request) -> None:
        super().check(request)
        num_scales = request.predictor.num_scales
        if not 1 <= self.drafted(num_scales) < num_scales:
            raise ValueError(
                f"draft_scales is {self.draft_scales}; with {num_scales} scales it must lie in [1, {num_scales - 1}]."
            )

    def drafted(self, num_scales: int) -> int:
        """Scales that the model draws, out of `num_scales`."""
        return max(1, num_scales - 2) if self.draft_scales is None else self.draft_scales

    def run(self, request: Request) -> DecodingResult:
        self.check(request)
        drafter = request.predictor
        refiner = self.refiner_predictor(request)
        stop = request.num_steps or drafter.num_scales
        generator = request.generator
        state = snapshot(generator, request.model.input_device)

        trace, inputs = Trace(), []
        paired = drafter.prefill_paired(request.inputs)
        draft_stop = min(self.drafted(drafter.num_scales), stop)
        while True:
            self.commit_scale(drafter, request, trace, paired)
            if trace.is_stopped or drafter.step == stop:
                return self.result(trace, drafter, drafter.calls)
            inputs.append(drafter.next_input())
            if drafter.step == draft_stop:
                break
            paired = drafter.predict_paired()

        refiner.start(request.inputs)
        refiner.adopt(drafter)
        paired = refiner.predict_paired(torch.cat(inputs, dim=1), range(refiner.step + 1))
        if request.generation_config.do_sample:
            rewind(generator, state)
            self._draw_again(refiner, paired.logits, generator)
        self.decode(refiner, request, trace, paired, stop)
        return self.result(trace, refiner, drafter.calls + refiner.calls)

    def refiner_predictor(self, request: Request) -> NextScalePredictor:
        """The refiner behind the drafter's guidance and image tokenizer."""
        model = request.model
        refiner = self.refiner if self.refiner is not None else getattr(model, "refiner", None)
        if refiner is None:
            raise ValueError(
                "CollaborativeNextScale needs a refiner: a small model of the same family, or its folder."
            )
        if isinstance(refiner, str):
            refiner = self.refiner = type(model).from_pretrained(refiner, dtype=model.dtype).to(model.device)
        if (
            refiner.config.patch_nums != model.config.patch_nums
            or refiner.config.vocab_size != model.config.vocab_size
        ):
            raise ValueError(
                f"The refiner has the scales {refiner.config.patch_nums} and {refiner.config.vocab_size} codes, the "
                f"model {model.config.patch_nums} and {model.config.vocab_size}; they must agree."
            )
        drafter = request.predictor
        return type(drafter)(refiner, drafter.guidance, image_tokenizer=model.check_image_tokenizer())

    def _draw_again(self, refiner: NextScalePredictor, logits: torch.Tensor, generator: Any) -> None:
        """
        The authors' refiner starts from the drafter's seed and draws for the drafted scales too, then drops those
        draws; to agree with it seed by seed, so do we. Noise does not depend on the distribution drawn from.
        """
        vocab = logits.shape[-1]
        for length in refiner.scale_lengths[: refiner.step]:
            categorical(logits.new_full((refiner.batch_size, length, vocab), 1 / vocab), generator)
