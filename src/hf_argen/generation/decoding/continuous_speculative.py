"""CSpD: a small model drafts continuous tokens, and the large one tests them by their densities (arXiv 2411.11925)."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch

from .. import _compat
from .base import DecodingResult, Guarantee, Request
from .continuous_speculation import Speculation
from .masked import Masked
from .token_loop import check_give_up_below


@dataclass
class ContinuousSpeculative(Masked):
    """
    A small model draws the tokens of several steps one after another; the model reads all these steps in one call, keeps the
    drafts up to the first that fails, and draws that one again. For diffusion heads.

    Both heads walk from the same noise (trajectory alignment). A draft passes with min(1, p / q), where p and q are the
    densities of the last `tested_steps` steps of its way under either head, products of normal distributions. One that fails
    is replaced by a draw from the rest, in proportion to max(p - q, 0), by acceptance and rejection of ways of the model's own
    head, which p bounds. So tokens follow the model alone, drafter or not, but for two things. All noise of a head's steps is
    drawn, where `Masked` leaves that of the last step out: its deviation is about 0.006 times the temperature. And where
    `max_trials` ways were refused, the last one is taken: this changes the distribution of a token by less than
    1 / (2.7 max_trials) in total variation. Without sampling the model draws alone.

    The paper tests the last step alone (`tested_steps=1`), with a factor for the deviations of the others that would bias
    it, which is left out here. Tokens of many channels then never pass; its authors' code therefore widens the
    normal distributions 42 times in the test (`acceptance_temperature=42`), after which nearly every draft passes and the
    picture is the drafter's; and it keeps what was drafted after a token that failed. More tested steps make drafts pass without that.

    Args:
        drafter: the small model, its folder or its Hub repository; stored by name. Needed. It has the same tokens and
            conditions, and a diffusion head.
        draft_length: steps that it draws before the model reads them. Steps of one token each pass most often.
        prefill: share of the steps, from the first on, that the model draws alone, since early drafts seldom pass.
        tested_steps: steps of the head at its end whose densities decide; default: all, or half of them where the first one,
            at the end of the training process, multiplies errors ("ddimN" leaves it out). The noise of those before is
            shared, and lets both heads arrive at nearly the same place.
        acceptance_temperature: 1 keeps the distribution. Above it drafts pass more often, with min(1, p / q) to the power of
            one over its square, and pictures become the drafter's.
        max_trials: ways that are drawn for a token that failed, at most.
        give_up_below: after the first 16 calls, a request whose rows gain fewer steps a call than this goes on without
            drafts; default: never.
    """

    drafter: Any = None
    draft_length: int = 4
    prefill: float = 0.05
    tested_steps: int | None = None
    acceptance_temperature: float = 1.0
    max_trials: int = 1000
    give_up_below: float | None = None

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT_IN_DISTRIBUTION
    knob: ClassVar[str | None] = None
    can_compile: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("draft_length", "tested_steps", "max_trials"):
            value = getattr(self, name)
            if value is None and name == "tested_steps":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
        if not (isinstance(self.prefill, Real) and 0 <= self.prefill <= 1):
            raise ValueError(
                f"prefill is {self.prefill!r}; it is a share of the steps and must lie in [0, 1]."
            )
        factor = self.acceptance_temperature
        if not (isinstance(factor, Real) and 1 <= factor < math.inf):
            raise ValueError(
                f"acceptance_temperature is {factor!r}; it must be a number, 1 (the model's own distribution) or above."
            )
        if factor != 1:
            self.guarantee, self.knob = Guarantee.RELAXED, "acceptance_temperature"
        check_give_up_below(self.give_up_below)

    @classmethod
    def fits(cls, model: Any) -> bool:
        """Models of a head whose tokens have densities; a class, whose head is not known, may have such."""
        if not super().fits(model) or not model.draws_latents:
            return False
        head = getattr(model, "head", None)
        return head is None or hasattr(head, "reverse_process")

    def run(self, request: Request) -> DecodingResult:
        if not request.generation_config.do_sample:
            return super().run(request)
        draws, plan = self.open(request)
        num_steps = len(plan.known) - 1
        taken = min(math.ceil(self.prefill * num_steps), num_steps)
        for step in range(taken):
            self.step(request, request.predictor, draws, plan, step, num_steps)
        speculation = Speculation(self, request, plan, taken)
        while not speculation.is_done:
            if taken and self.is_over(request):
                self.draw_rest(request, draws, plan, request.predictor.lengths)
            else:
                speculation.advance()
                self.stream(request)
            taken += 1
        result = self.result(request, draws, plan, taken)
        result.forward_calls += speculation.drafter.calls
        result.details["head_calls"] += speculation.drafter_head_calls
        gained = torch.tensor(speculation.tokens_gained, dtype=torch.long)
        result.details["accept_lengths"] = gained.view(-1, len(result.sequences)).t()
        return result

    def check(self, request: Request) -> None:
        super().check(request)
        total, head_steps = request.predictor.capacity, request.model.head.sampling_steps
        if self.draft_length > total:
            raise ValueError(
                f"draft_length is {self.draft_length}; a picture of this model has {total} tokens, so draft fewer steps."
            )
        if self.tested_steps is not None and self.tested_steps > head_steps:
            raise ValueError(
                f"tested_steps is {self.tested_steps}; the head of this model takes {head_steps} steps: test at most these."
            )
        self.drafter_for(request.model)

    def drafter_for(self, model: Any) -> Any:
        """The drafting model; an error unless it draws the same tokens from the same conditions."""
        drafter, name = self.drafter, type(model).__name__
        if drafter is None:
            raise ValueError(
                "ContinuousSpeculative needs a drafter: a small model of the same family, or its folder."
            )
        if isinstance(drafter, str):
            drafter = self.drafter = _compat.load_like(model, drafter)
        if type(drafter) is not type(model):
            raise ValueError(
                f"The drafter is a {type(drafter).__name__}, the model a {name}; give one of the same family."
            )
        if not hasattr(drafter.head, "reverse_process"):
            raise ValueError(
                f"The drafter has a {drafter.head.head_type} head, which gives no densities to test drafts by; give one "
                f"with a {model.head.head_type} head."
            )
        for what, (own, theirs) in facts(model, drafter).items():
            if own != theirs:
                raise ValueError(
                    f"The drafter has {what} {theirs}, the model {own}; they must agree: give a drafter that was trained on "
                    "the same latents and conditions."
                )
        return drafter


def facts(model: Any, drafter: Any) -> dict[str, tuple[Any, Any]]:
    """What has to be the same in two models of which one drafts for the other: its name -> what it is in both."""
    found = {}
    for what, name in (
        ("tokens of size", "token_size"),
        ("a grid of tokens of", "grid_sizes"),
        ("patches of", "patch_size"),
        ("causal =", "causal"),
        ("conditions of type", "condition_type"),
        ("a number of classes of", "num_classes"),
        ("text embeddings of width", "text_embed_dim"),
    ):
        found[what] = getattr(model.config, name), getattr(drafter.config, name)
    for what, part, name in (
        ("a latent scale of", "image_tokenizer_config", "latent_scale"),
        ("a text encoder of so many tokens:", "text_encoder_config", "vocab_size"),
    ):
        parts = [getattr(one.config, part) for one in (model, drafter)]
        if all(one is not None for one in parts):
            found[what] = tuple(getattr(one, name) for one in parts)
    return found
