"""Masked generation: sets of tokens in any order, each set at once (MAR, arXiv 2406.11838)."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from transformers import MaxLengthCriteria, MaxTimeCriteria, TemperatureLogitsWarper

from .. import _compat, sampling
from ..predictors.masked import MaskedPredictor
from ..schedules import MASK_SCHEDULES, hidden_after_steps
from .base import Decoding, DecodingResult, Guarantee, Request
from .masked_draws import Annealing, Draws, IdDraws, LatentDraws, Step, check_id_options

MOST_STEPS = 64  # unless the decoding says otherwise
ORDERS = ("random", "raster", "confidence", "numpy")


@dataclass
class Plan:
    """
    Which positions each step predicts.

    Attributes:
        orders: (batch, tokens) int64, positions in the order in which they become known; fixed ones first.
        known: for each step, tokens of each row that are known before it; and after the last, all.
    """

    orders: torch.Tensor
    known: list[list[int]]

    def positions(self, step: int, is_sorted: bool = True) -> tuple[torch.Tensor, list[int]]:
        """
        Positions (batch, n) of a step, and their number in each row. Shorter rows are padded with the number of tokens.

        Args:
            is_sorted: row by row of the picture, not in the order.
        """
        return self._between(self.known[step], self.known[step + 1], is_sorted)

    def positions_of_rows(self, steps: list[int]) -> tuple[torch.Tensor, list[int]]:
        """As `positions`, of one step for each row; none of a row of which all steps are done."""
        ends = [self.known[min(step, len(self.known) - 1)][row] for row, step in enumerate(steps)]
        stops = [self.known[min(step + 1, len(self.known) - 1)][row] for row, step in enumerate(steps)]
        return self._between(ends, stops, is_sorted=True)

    def remaining(self, step: int) -> tuple[torch.Tensor, list[int]]:
        """As `positions`, of all that are not known before a step."""
        return self._between(self.known[step], self.known[-1], is_sorted=True)

    def _between(self, start: list[int], stop: list[int], is_sorted: bool) -> tuple[torch.Tensor, list[int]]:
        counts = [end - begin for begin, end in zip(start, stop, strict=True)]
        most, tokens = max(counts), self.orders.shape[1]
        if min(counts) == most and min(start) == max(start):
            found = self.orders[:, start[0] : stop[0]]
        else:
            device = self.orders.device
            places = torch.tensor(start, device=device)[:, None] + torch.arange(most, device=device)
            inside = places < torch.tensor(stop, device=device)[:, None]
            found = torch.where(inside, self.orders.gather(1, places.clamp(max=tokens - 1)), tokens)
        return (found.sort(dim=1).values if is_sorted else found), counts

    def surest_first(self, step: int, positions: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
        """
        Puts the positions that are not known before a step into the order of falling confidence.

        Args:
            positions, confidence: (batch, n), from `remaining`.

        Returns:
            (batch, most of the step), which of the n become known.
        """
        tokens = self.orders.shape[1]
        padding = positions == tokens
        ranked = confidence.masked_fill(padding, -torch.inf).argsort(dim=1, descending=True, stable=True)
        start = torch.tensor(self.known[step], device=positions.device)[:, None]
        places = start + torch.arange(positions.shape[1], device=positions.device)
        # One place more than there are positions: padding goes there.
        room = torch.cat([self.orders, self.orders[:, :1]], dim=1)
        sorted_positions = positions.gather(1, ranked)
        self.orders = room.scatter(1, places.clamp(max=tokens), sorted_positions)[:, :tokens]
        counts = [stop - begin for begin, stop in zip(self.known[step], self.known[step + 1], strict=True)]
        return ranked[:, : max(counts)]


@dataclass
class Masked(Decoding):
    """
    Predicts a few tokens, then, knowing them, more at a time.

    Args:
        num_steps: sets of tokens, at most one per token; default: 64, or one per token of smaller pictures.
        order: "random"; "raster", row by row; "confidence", always the tokens that the head is surest of once all hidden ones
            are drawn, for heads that can tell (arXiv 2202.04200); "numpy", random orders from numpy's global generator, as the authors'
            sampler draws them, so that its seeds give its pictures; or a permutation of the positions, one for all
            pictures or a list of one for each. Without sampling "random" is one fixed order.
        schedule: how fast the share of hidden tokens falls: "cosine", "linear", "arccos", "square_root" or "square".
        randomize_temperature: of ids: the Gumbel noise on logits and confidences, as a factor that falls step by step, to
            nothing at the last (TiTok, arXiv 2406.07550); takes the place of drawing from the model's own distribution.
        softmax_temperature_annealing: of ids: divide the logits by a number that falls from 1.3 to 0.5 over the steps.
    """

    num_steps: int | None = None
    order: str | list = "random"
    schedule: str = "cosine"
    randomize_temperature: float | None = None
    softmax_temperature_annealing: bool = False

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    predictor_class: ClassVar[type[MaskedPredictor]] = MaskedPredictor
    can_compile: ClassVar[bool] = True

    def __post_init__(self) -> None:
        steps = self.num_steps
        if steps is not None and (not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"num_steps is {steps!r}; it must be a whole number of at least 1.")
        if self.schedule not in MASK_SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; known are {', '.join(MASK_SCHEDULES)}.")
        noise = self.randomize_temperature
        if noise is not None and not (isinstance(noise, Real) and 0 <= noise < math.inf):
            raise ValueError(f"randomize_temperature is {noise!r}; it must be a number, 0 or above.")
        if isinstance(self.order, str):
            if self.order not in ORDERS:
                raise ValueError(
                    f"order is {self.order!r}; known are {', '.join(ORDERS)}, or give a permutation."
                )
        else:
            self.order = self.as_positions(self.order)

    @staticmethod
    def as_positions(order: Any) -> list:
        """A permutation, or a list of them, from what users write: lists, tuples, tensors, arrays."""
        try:
            found = torch.as_tensor(order.tolist() if hasattr(order, "tolist") else list(order))
        except (TypeError, ValueError, RuntimeError):
            found = torch.zeros(())
        if found.ndim not in (1, 2) or found.is_floating_point() or found.dtype == torch.bool:
            raise ValueError(
                f"order is {order!r}; give one of {', '.join(ORDERS)}, or a permutation of the positions, one for all pictures "
                "or a list of one for each."
            )
        return found.tolist()

    # The loop

    def run(self, request: Request) -> DecodingResult:
        draws, plan = self.open(request)
        num_steps, taken = len(plan.known) - 1, 0
        while taken < num_steps:
            if taken and self.is_over(request):
                self.draw_rest(request, draws, plan, plan.known[taken])
                taken += 1
                break
            self.step(request, request.predictor, draws, plan, taken, num_steps)
            taken += 1
        return self.result(request, draws, plan, taken)

    def open(self, request: Request) -> tuple[Draws, Plan]:
        """Checks and reads a request; what draws its tokens, and in which order."""
        self.check(request)
        predictor = request.predictor
        predictor.start(request.inputs)
        self.check_rows(request, predictor.batch_size)
        draws = self.draws(request, predictor)
        plan = self.plan(request, predictor)
        if request.edit is not None:
            self.keep_source(request, predictor, plan)
        return draws, plan

    def draw_rest(self, request: Request, draws: Draws, plan: Plan, known: list[int]) -> None:
        """Draws all tokens at once that are not among the first `known` of each row."""
        plan = Plan(plan.orders, [known, plan.known[-1]])
        self.step(request, request.predictor, draws, plan, 0, 1)

    def result(self, request: Request, draws: Draws, plan: Plan, taken: int) -> DecodingResult:
        """What `taken` steps gave."""
        predictor = request.predictor
        sequences = request.model.from_tokens(predictor.tokens)
        return DecodingResult(
            sequences=sequences,
            decodable=None,
            steps=taken,
            forward_calls=predictor.calls,
            is_finite=draws.is_finite(sequences),
            details={"orders": plan.orders, **draws.details()},
        )

    def draws(self, request: Request, predictor: MaskedPredictor) -> Draws:
        """What draws the tokens of a request."""
        if request.model.draws_latents:
            return LatentDraws(request, predictor)
        annealing = Annealing(self.randomize_temperature, self.softmax_temperature_annealing)
        return IdDraws(request, predictor, annealing)  # type: ignore[arg-type]

    def step(
        self,
        request: Request,
        predictor: MaskedPredictor,
        draws: Draws,
        plan: Plan,
        step: int,
        num_steps: int,
    ) -> None:
        """Predicts, draws and commits the tokens of one step."""
        is_sorted = self.order == "confidence"
        positions, counts = (plan.remaining if is_sorted else plan.positions)(step)
        hidden = predictor.predict(positions=positions)
        guidance = self.guidance(predictor, plan, step, num_steps) if predictor.is_guided else None
        options = self.head_options(request, predictor, plan, step)
        tokens, confidence = draws.take(
            hidden, Step(positions, guidance, (step + 1) / num_steps, is_sorted, options)
        )
        places = None
        if confidence is not None:
            places = plan.surest_first(step, positions, confidence)
            tokens = tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
            positions, counts = plan.positions(step, is_sorted=False)
        predictor.commit(tokens, positions, counts)
        draws.committed(places, positions)
        self.stream(request)

    @staticmethod
    def stream(request: Request) -> None:
        """Shows the pictures so far, where that is asked for."""
        if request.streamer is not None:
            tokens = request.predictor.tokens
            request.streamer.put(request.model.decode_images(request.model.from_tokens(tokens)))

    @classmethod
    def guidance(
        cls, predictor: MaskedPredictor, plan: Plan, step: int, num_steps: int
    ) -> float | torch.Tensor:
        """Weight of the conditional prediction; one for each row (batch,) where they know unequal numbers of tokens."""
        weights = cls.weights(predictor, plan, [step] * predictor.batch_size, num_steps)
        same = all(weight == weights[0] for weight in weights)
        return weights[0] if same else torch.tensor(weights, device=predictor.tokens.device)

    @staticmethod
    def weights(predictor: MaskedPredictor, plan: Plan, steps: list[int], num_steps: int) -> list[float]:
        """Weight of the conditional prediction in each row, of one step for each."""
        # The authors count one token as hidden to the end.
        known = [min(plan.known[step + 1][row], predictor.capacity - 1) for row, step in enumerate(steps)]
        return [
            1 + predictor.strength(step, num_steps, count) for step, count in zip(steps, known, strict=True)
        ]

    def head_options(
        self, request: Request, predictor: MaskedPredictor, plan: Plan, step: int
    ) -> dict[str, Any]:
        """What the head is told beyond guidance and temperature."""
        return {}

    @staticmethod
    def is_over(request: Request) -> bool:
        """Whether time is up; what is left is then predicted at once."""
        if not request.stopping_criteria:
            return False
        tokens = request.predictor.tokens
        empty = torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)
        return bool(request.stopping_criteria(empty, None).all())

    # The plan

    def plan(self, request: Request, predictor: MaskedPredictor) -> Plan:
        """Orders, and how many tokens are known before each step and at the end."""
        total, batch = predictor.capacity, predictor.batch_size
        orders = self.draw_orders(request, total, batch, predictor.tokens.device)
        fixed = [0] * batch
        if request.edit is not None:
            keep = request.edit.keep.flatten(1).bool()
            keep = keep.expand(batch, -1)
            fixed = keep.sum(dim=1).tolist()
            first = torch.argsort((~keep.gather(1, orders)).to(torch.uint8), dim=1, stable=True)
            orders = orders.gather(1, first)
        steps = total if request.model.config.causal else self.num_steps or MOST_STEPS
        steps = min(steps, total - min(fixed))
        after = [hidden_after_steps(total - known, steps, self.schedule) for known in fixed]
        known = [fixed]
        for step in range(steps):
            row = [total - left[step] for left in after]
            if row != known[-1]:  # steep schedules have steps that would predict nothing
                known.append(row)
        return Plan(orders, known)

    def draw_orders(self, request: Request, total: int, batch: int, device: torch.device) -> torch.Tensor:
        """Positions (batch, total) in the order in which they are predicted."""
        if isinstance(self.order, list):
            orders = torch.tensor(self.order, device=device)
            return orders.expand(batch, -1) if orders.ndim == 1 else orders
        if self.order in ("raster", "confidence"):
            return torch.arange(total, device=device).expand(batch, -1)
        if not request.generation_config.do_sample:
            fixed = torch.randperm(total, generator=torch.Generator().manual_seed(0))
            return fixed.to(device).expand(batch, -1)
        if self.order == "numpy":  # the authors predict from the end of an order to its start
            return sampling.numpy_permutations(total, batch, device).flip(1)
        return sampling.permutations(total, batch, request.generator, device)

    @staticmethod
    def keep_source(request: Request, predictor: MaskedPredictor, plan: Plan) -> None:
        """Commits the kept tokens of a source picture."""
        before = Plan(plan.orders, [[0] * predictor.batch_size, plan.known[0]])
        positions, counts = before.positions(0)
        source = request.model.to_tokens(request.edit.ids).expand(predictor.batch_size, -1, -1)
        places = positions.clamp(max=predictor.capacity - 1).unsqueeze(-1)
        predictor.commit(source.gather(1, places.expand(-1, -1, source.shape[-1])), positions, counts)

    # What is refused

    def check(self, request: Request) -> None:
        """Refuses what cannot be honoured, before anything is computed."""
        predictor = request.predictor
        total = predictor.capacity
        if self.num_steps is not None and self.num_steps > total:
            raise ValueError(
                f"num_steps is {self.num_steps}; this model has {total} tokens, and every step predicts one at least."
            )
        self.check_order(total)
        if request.model.config.causal:
            self.check_causal(request)
        if self.order == "confidence" and not request.model.head.has_confidence:
            raise ValueError(
                f"A {request.model.head.head_type} head does not tell how sure it is of a token; take another order."
            )
        if self.order == "numpy" and _compat.tensor_parallel_group(request.model) is not None:
            raise ValueError(
                "order='numpy' differs between the processes of tensor parallelism; take order='random'."
            )
        if request.model.draws_latents:
            self.check_latent_options(request)
        else:
            check_id_options(request)
        known = (MaxTimeCriteria, MaxLengthCriteria)
        if others := [one for one in request.stopping_criteria if not isinstance(one, known)]:
            raise ValueError(
                f"{type(others[0]).__name__} reads a sequence of ids, which a masked model does not draw; of stopping criteria "
                "there is max_time alone."
            )
        if request.edit is not None:
            counts = request.edit.keep.flatten(1).sum(dim=1)
            if bool((counts == total).any()):
                raise ValueError("keep_mask keeps all of a picture; nothing is left to draw.")
            if bool((counts == 0).any()):
                raise ValueError("keep_mask keeps nothing of a picture; leave the source picture out.")

    def check_latent_options(self, request: Request) -> None:
        """Refuses what is for ids alone."""
        name = type(request.model).__name__
        if others := [p for p in request.logits_processor if not isinstance(p, TemperatureLogitsWarper)]:
            raise ValueError(
                f"{name} draws continuous tokens, which have no logits for {type(others[0]).__name__}; leave top_k, top_p "
                "and logits processors out."
            )
        if request.generation_config.output_logits:
            raise ValueError(
                f"{name} draws continuous tokens, which have no logits; leave output_logits out."
            )
        for option in ("randomize_temperature", "softmax_temperature_annealing"):
            if getattr(self, option):
                raise ValueError(f"{name} draws continuous tokens, which have no logits; leave {option} out.")

    def check_causal(self, request: Request) -> None:
        """Refuses what a model cannot do that draws token after token."""
        total = request.predictor.capacity
        if self.order != "raster" or self.num_steps not in (None, total):
            raise ValueError(
                f"This model is causal: it draws one token at a time, row by row; take order='raster' and {total} steps."
            )
        if request.edit is not None:
            keep = request.edit.keep.flatten(1)
            if bool((keep[:, 1:] > keep[:, :-1]).any()) or bool((keep != keep[:1]).any()):
                raise ValueError(
                    "This model is causal: it can keep the first tokens of a picture only, the same in all pictures."
                )

    def check_order(self, total: int) -> None:
        """Refuses an order that is no permutation of the positions."""
        if isinstance(self.order, str):
            return
        rows = self.order if self.order and isinstance(self.order[0], list) else [self.order]
        for row in rows:
            if sorted(row) != list(range(total)):
                raise ValueError(
                    f"An order has {len(row)} positions; it must be a permutation of 0 to {total - 1}, each once."
                )

    def check_rows(self, request: Request, batch: int) -> None:
        """Refuses orders of another number of pictures."""
        if isinstance(self.order, list) and isinstance(self.order[0], list) and len(self.order) != batch:
            raise ValueError(
                f"There are {len(self.order)} orders for {batch} pictures; give one for all, or one for each."
            )
