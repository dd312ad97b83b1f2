"""A request under continuous speculative decoding: drafts, their test, and what is drawn instead (arXiv 2411.11925)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from .. import sampling
from ..predictors.masked import MaskedPredictor
from .base import Request
from .masked import Masked, Plan
from .token_loop import drafting_loses


class Options(Protocol):
    """The options of [`ContinuousSpeculative`], and its drafter."""

    draft_length: int
    tested_steps: int | None
    acceptance_temperature: float
    max_trials: int
    give_up_below: float | None

    def drafter_for(self, model: Any) -> Any: ...


@dataclass
class Round:
    """
    What is known of the tokens of a round. They are numbered through, padding included: the place in a step varies fastest,
    then the step, then the row; these are their slots.

    Attributes:
        positions: (batch, steps, width) int64, where the tokens are; the number of tokens pads.
        counts: for each step, the tokens of each row that are none of padding.
        depths: steps that are drafted in each row; the one after them is the model's own. -1 where all is done.
        weights: (batch, steps) of guidance, or `None`.
        noise: (slots, 1 + head steps, token_size), where a token begins, and what each step of a head adds.
        tokens: (slots, token_size), drafts; after the test what is kept of them, and what was drawn instead.
        ways: (tested steps + 1, slots, token_size), how the drafter's head came to its drafts, from where densities decide.
        densities: (slots,) float64, logarithms of those of the ways; -inf where there is no draft.
        drafting: the steps of the drafter's head; `None` where nothing is drafted.
    """

    positions: torch.Tensor
    counts: list[list[int]]
    depths: list[int]
    weights: torch.Tensor | None
    noise: torch.Tensor
    tokens: torch.Tensor
    ways: torch.Tensor
    densities: torch.Tensor
    drafting: Any = None

    @property
    def steps(self) -> int:
        """Steps of the row with most of them."""
        return self.positions.shape[1]

    @property
    def width(self) -> int:
        """Places of a step, padding included."""
        return self.positions.shape[2]

    def slots(self, only_drafts: bool, step: int | None = None) -> torch.Tensor:
        """Slots of tokens, or of drafts alone, (n,) int64; of all steps or one."""
        found = [
            (row * self.steps + ahead) * self.width + place
            for row, depth in enumerate(self.depths)
            for ahead in range(depth + (not only_drafts))
            if step in (None, ahead)
            for place in range(self.counts[ahead][row])
        ]
        return torch.tensor(found, dtype=torch.long, device=self.positions.device)

    def by_step(self, values: torch.Tensor) -> torch.Tensor:
        """Values (slots, ...) as (batch, steps, width, ...)."""
        return values.unflatten(0, self.positions.shape)


class Speculation:
    """
    Draws the tokens of a request in rounds; rows gain unequal numbers of steps.

    Args:
        options: of the decoding.
        request: the request, whose predictor knows the tokens of the first steps.
        plan: which tokens each step draws.
        first: the step to begin with.

    Attributes:
        drafter: the predictor of the drafting model.
        at: the next step of each row.
        tokens_gained, steps_gained: [round][row].
    """

    def __init__(self, options: Options, request: Request, plan: Plan, first: int):
        self.options, self.request, self.plan = options, request, plan
        self.predictor: MaskedPredictor = request.predictor  # type: ignore[assignment]
        drafting_model = options.drafter_for(request.model)
        self.drafter = self.predictor.for_model(drafting_model)
        self.drafter.start(request.inputs)
        self.head, self.drafting_head = request.model.head, drafting_model.head
        self.head_calls_before = self.drafting_head.calls
        self.head_steps: int = self.head.sampling_steps
        self.tested: int = options.tested_steps or self.head.telling_steps
        self.temperature = request.generation_config.temperature or 1.0
        self.num_steps = len(plan.known) - 1
        self.width = max(
            stop - start
            for before, after in pairwise(plan.known)
            for start, stop in zip(before, after, strict=True)
        )
        self.at = [first] * self.predictor.batch_size
        self.tokens_gained: list[list[int]] = []
        self.steps_gained: list[list[int]] = []

    @property
    def is_done(self) -> bool:
        """Whether all tokens are known."""
        return min(self.predictor.lengths) == self.predictor.capacity

    @property
    def drafter_head_calls(self) -> int:
        """Runs of the network of the drafter's head, where that is another one."""
        return 0 if self.drafting_head is self.head else self.drafting_head.calls - self.head_calls_before

    def advance(self) -> None:
        """A round: drafts several steps, tests them in one call of the model, commits what it made of them."""
        now = self.open()
        self.draft(now)
        drafts = now.by_step(now.tokens)[:, :-1]
        hidden = self.predictor.predict_ahead(drafts, now.positions, now.counts[:-1])
        target = self.steps_back(self.head, hidden, now.weights)
        begins, slots = torch.zeros_like(now.tokens), now.slots(only_drafts=False)
        begins[slots] = self.aligned(target.select(slots), now.noise[slots])
        passed = self.test(now, target, begins)
        last, missed = self.last_steps(now, passed)
        self.redraw(now, target, begins, missed)
        self.commit(now, last)

    # Drafts

    def open(self) -> Round:
        """Where the tokens of a round are, how far it looks ahead, and its noise."""
        batch, total, device = len(self.at), self.predictor.capacity, self.predictor.tokens.device
        longest = self.options.draft_length
        if drafting_loses(self.steps_gained, self.options.give_up_below):
            longest = 0
        depths = [min(longest, self.num_steps - step - 1) for step in self.at]
        steps = max(depths) + 1
        positions = torch.full((batch, steps, self.width), total, device=device)
        counts, weights = [], []
        for ahead in range(steps):
            places = [step + ahead for step in self.at]
            found, numbers = self.plan.positions_of_rows(places)
            positions[:, ahead, : found.shape[1]] = found
            counts.append(numbers)
            if self.predictor.is_guided:
                inside = [min(step, self.num_steps - 1) for step in places]
                weights.append(Masked.weights(self.predictor, self.plan, inside, self.num_steps))
        # Of the longest draft's shape, whatever the other rows still have to do, so that a row's noise does not depend on them.
        size = self.head.token_size
        shape = (batch, self.options.draft_length + 1, self.width, 1 + self.head_steps, size)
        noise = sampling.normal(shape, self.request.generator, device)[:, :steps].flatten(0, 2)
        return Round(
            positions,
            counts,
            depths,
            torch.tensor(weights, device=device).t() if weights else None,
            noise,
            tokens=noise.new_zeros(len(noise), size),
            ways=noise.new_zeros(self.tested + 1, len(noise), size),
            densities=noise.new_full((len(noise),), -torch.inf, dtype=torch.double),
        )

    def steps_back(self, head: Any, hidden: torch.Tensor, weights: torch.Tensor | None) -> Any:
        """The steps of a head, as many as the model's head takes, from hidden states (passes * batch, steps, width, dim)."""
        weights = None if weights is None else weights.flatten()
        steps = str(self.head.num_sampling_steps)  # text is taken as it stands, whatever the head's own
        return head.reverse_process(hidden.flatten(0, 1), weights, self.temperature, steps)

    def aligned(self, process: Any, noise: torch.Tensor) -> torch.Tensor:
        """Where a head is after the steps whose noise is shared, (rows, token_size), from noise (rows, ...)."""
        shared = noise[:, 1 : 1 + self.head_steps - self.tested].transpose(0, 1)
        return process.walk(noise[:, 0], shared, last=self.tested)[0][-1]

    def draft(self, now: Round) -> None:
        """The drafter draws one step after another."""
        self.drafter.adopt(self.predictor)
        seen = []
        for step in range(now.steps - 1):
            positions = now.positions[:, step]
            seen.append(self.drafter.predict(positions=positions).unsqueeze(1))
            weights = None if now.weights is None else now.weights[:, step]
            slots = now.slots(only_drafts=True, step=step)
            rows = slots // (now.steps * now.width) * now.width + slots % now.width
            process = self.steps_back(self.drafting_head, seen[-1], weights).select(rows)
            noise = now.noise[slots]
            rest = noise[:, 1 + self.head_steps - self.tested :].transpose(0, 1)
            now.ways[:, slots], now.densities[slots] = process.walk(self.aligned(process, noise), rest)
            now.tokens[slots] = now.ways[-1, slots]
            self.drafter.commit(now.by_step(now.tokens)[:, step], positions, now.counts[step])
        if seen:
            self.check_drafts(now)
            hidden = torch.cat([*seen, torch.zeros_like(seen[0])], dim=1)
            now.drafting = self.steps_back(self.drafting_head, hidden, now.weights)

    def check_drafts(self, now: Round) -> None:
        """Refuses those of a broken drafter; where the model itself is, that is said in the end."""
        whole = torch.isfinite(now.tokens).all() | ~torch.isfinite(self.predictor.tokens).all()
        if not bool(whole):
            raise ValueError(
                "The drafter of ContinuousSpeculative produced NaN or infinity: its weights are damaged; load it again."
            )

    # Their test

    def test(self, now: Round, target: Any, begins: torch.Tensor) -> torch.Tensor:
        """
        Args:
            target: the steps of the model's head.
            begins: (slots, token_size), where they lead by the shared noise.

        Returns:
            (batch, steps, width) bool, which tokens are drafts that pass.
        """
        # Of one shape, as the noise.
        shape = (len(now.depths), self.options.draft_length, now.width)
        chance = sampling.rand(shape, self.request.generator, begins.device)[:, : now.steps - 1]
        passed = torch.zeros(len(begins), dtype=torch.bool, device=begins.device)
        if now.drafting is not None:
            slots = now.slots(only_drafts=True)
            ways = torch.cat([begins[slots][None], now.ways[1:, slots]])
            ratio = target.select(slots).log_density(ways) - now.densities[slots]
            limit = (ratio / self.options.acceptance_temperature**2).exp()
            chance = torch.nn.functional.pad(chance, (0, 0, 0, 1)).flatten()
            passed[slots] = chance[slots] < limit
        return now.by_step(passed)

    def last_steps(self, now: Round, passed: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """
        The last step of each row that counts, -1 if none does: the first with a draft that failed, or the one after the
        drafts. And the slots of what is to be drawn there, (n,) int64.
        """
        misses = ((now.positions < self.predictor.capacity) & ~passed).tolist()
        last, missed = [], []
        for row, depth in enumerate(now.depths):
            steps = misses[row][: depth + 1]
            last.append(next((step for step, places in enumerate(steps) if any(places)), depth))
            begin = (row * now.steps + last[-1]) * now.width
            missed += [begin + place for place, miss in enumerate(steps[last[-1]] if steps else []) if miss]
        return last, torch.tensor(missed, dtype=torch.long, device=passed.device)

    # What is drawn instead

    def redraw(self, now: Round, target: Any, begins: torch.Tensor, slots: torch.Tensor) -> None:
        """
        Draws tokens in proportion to max(p - q, 0): ways of the model's head, of which each is taken with max(1 - q / p, 0).
        Where there was no draft, q is 0.
        """
        tried, size = 0, 1
        while len(slots):
            size = min(size, self.options.max_trials - tried)
            rows, index = (slots // (now.steps * now.width)).unique(return_inverse=True)
            noise, chance = self.fresh(rows.tolist(), size, now.width)
            places = slots % now.width
            each = slots.repeat(size)  # trial after trial
            noise = noise[index, :, :, places].permute(2, 1, 0, 3).flatten(1, 2)
            ways, density = target.select(each).walk(begins[each], noise)
            share = 1 - (self.density_of_drafter(now, each, ways) - density).exp()
            taken = chance[index, :, places].t().flatten() < share
            # Where the model is broken there is nothing to wait for.
            taken = (taken | ~torch.isfinite(ways[-1]).all(dim=1)).view(size, -1)
            tried += size
            is_last = tried == self.options.max_trials
            found = taken.any(dim=0)
            trial = torch.where(found, taken.to(torch.uint8).argmax(dim=0), size - 1)
            each_token = torch.arange(len(slots), device=slots.device)
            now.tokens[slots] = ways[-1].unflatten(0, (size, -1))[trial, each_token]
            slots = slots[~found] if not is_last else slots[:0]
            size *= 2

    def density_of_drafter(self, now: Round, slots: torch.Tensor, ways: torch.Tensor) -> torch.Tensor:
        """Logarithm of the density (n,) that ways of the model's head have under the drafter's; -inf without draft."""
        density = now.densities[slots]
        drafted = (density > -torch.inf).nonzero().squeeze(1)
        if len(drafted):
            own = slots[drafted]
            ways = torch.cat([now.ways[:1, own], ways[1:, drafted]])
            density[drafted] = now.drafting.select(own).log_density(ways)
        return density

    def fresh(self, rows: list[int], trials: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        New random numbers for some rows.

        Returns:
            normal noise (rows, trials, tested steps, width, token_size), and uniform (rows, trials, width).
        """
        generator = self.request.generator
        if isinstance(generator, list | tuple):
            generator = [generator[row] for row in rows]
        device = self.predictor.tokens.device
        shape = (len(rows), trials, self.tested, width, self.head.token_size)
        noise = sampling.normal(shape, generator, device)
        return noise, sampling.rand((len(rows), trials, width), generator, device)

    def commit(self, now: Round, last: list[int]) -> None:
        """Makes the tokens of each row's steps up to the last one known."""
        gains = [sum(numbers[row] for numbers in now.counts[: last[row] + 1]) for row in range(len(last))]
        device = now.positions.device
        is_kept = torch.arange(now.steps, device=device) <= torch.tensor(last, device=device)[:, None]
        places = torch.where(is_kept.unsqueeze(-1), now.positions, self.predictor.capacity)
        self.predictor.commit(now.by_step(now.tokens).flatten(1, 2), places.flatten(1), gains)
        self.at = [step + stop + 1 for step, stop in zip(self.at, last, strict=True)]
        self.tokens_gained.append(gains)
        self.steps_gained.append([stop + 1 for stop in last])
