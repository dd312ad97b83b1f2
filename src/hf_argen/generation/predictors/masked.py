"""Predictor of masked models (MAR, arXiv 2406.11838): one call predicts hidden tokens at any positions."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch

from ..cache import PreallocatedCache
from ..guidance import Guidance
from .base import Predictor


class MaskedPredictor(Predictor):
    """
    Drives a model that has `conditions`, `null_conditions`, `masked_hidden_states` and a head of continuous tokens.

    What is committed are tokens at positions. The model sees all of them from both sides, so nothing of a call can be kept
    for the next one. Rows may have unequal numbers of tokens. A causal model, which has `next_states`, keeps keys and values;
    its tokens are committed row by row of the picture.

    Args:
        model: the masked model.
        guidance: strength of guidance. A schedule that is a function gets, as its step, how many tokens are known once the
            step is done, out of all of them, so that `linear` is that of Muse (arXiv 2301.00704) and MAR.
    """

    default_decoding = "masked"

    def __init__(self, model: Any, guidance: Guidance):
        self.model = model
        self.guidance = guidance
        self.capacity: int = model.config.num_image_tokens
        self.calls = 0
        self.is_guided = guidance.scale > guidance.neutral

    def start(self, inputs: dict[str, Any]) -> None:
        """
        Reads the request without predicting anything yet.

        Args:
            inputs: keywords of the model's `conditions`.
        """
        conditions = self.model.conditions(**inputs)
        first = next(iter(conditions.values()))
        self.batch_size, device = len(first), first.device
        if self.is_guided:
            null = self.model.null_conditions(conditions)
            conditions = {name: torch.cat([value, null[name]]) for name, value in conditions.items()}
        self._conditions = conditions
        # One place more than there are positions: what pads shorter rows goes there.
        self._tokens = torch.zeros(
            self.batch_size, self.capacity + 1, self.model.config.token_size, device=device
        )
        self._known = torch.zeros(self.batch_size, self.capacity + 1, dtype=torch.bool, device=device)
        self.lengths = [0] * self.batch_size
        self._cache: PreallocatedCache | None = None
        self._next = 0  # the places before it need not be read again, with a cache

    def for_model(self, model: Any) -> Self:
        """A predictor of another model with the same guidance."""
        return type(self)(model, self.guidance)

    def adopt(self, other: Self) -> None:
        """Takes what is committed in a predictor of another model of the same tokens for its own."""
        self._tokens, self._known, self.lengths = other._tokens, other._known, other.lengths
        self._next = min(self._next, *self.lengths)

    @property
    def length(self) -> torch.Tensor:
        """(batch,) int64, committed tokens of each row."""
        return torch.tensor(self.lengths, device=self._tokens.device)

    @property
    def tokens(self) -> torch.Tensor:
        """(batch, tokens, token_size) float32, zero where nothing is committed."""
        return self._tokens[:, : self.capacity]

    def strength(self, step: int, num_steps: int, known: int) -> float:
        """
        Guidance strength.

        Args:
            step, num_steps: of the decoding.
            known: tokens that are known when the step is done, but for the last step one fewer.
        """
        if callable(self.guidance.factor):
            return self.guidance.strength(known, self.capacity + 1)
        return self.guidance.strength(step, num_steps)

    def prefill(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Reads the request; hidden states of all positions, see `predict`."""
        self.start(inputs)
        return self.predict()

    def predict(self, tokens: None = None, positions: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            tokens: not used; what the model sees is what was committed.
            positions: (batch, n) int64, where to predict; default: everywhere. Those equal to `capacity` pad.

        Returns:
            what the head draws from, (batch, n, dim); guided, (2 * batch, n, dim), conditional rows first.
        """
        if self.model.config.causal:
            return self._predict_next()
        is_even = min(self.lengths) == max(self.lengths)
        hidden = self.run(
            masked_step,
            self.model,
            self._tokens,
            self._known,
            max(self.lengths),
            None if is_even else self.length,
            self._conditions,
            positions,
            self.is_guided,
        )
        self.calls += 1
        return hidden

    def why_not_compiled(self) -> str | None:
        return "a causal model has a longer past at every step" if self.model.config.causal else None

    def predict_ahead(
        self, drafts: torch.Tensor, positions: torch.Tensor, counts: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """
        One call for several steps, each of which sees the drafts of those before it as if they were known.

        Args:
            drafts: (batch, steps - 1, n, token_size), at the first of these positions.
            positions: (batch, steps, n) int64; those equal to `capacity` pad.
            counts: for each step but the last, the tokens of each row that are none of padding.

        Returns:
            what the head draws from at each step, (batch, steps, n, dim); guided, (2 * batch, steps, n, dim).
        """
        steps = positions.shape[1]
        ahead = copy(self)
        before = positions[:, :-1]
        if self.model.config.causal:
            numbers = [sum(step[row] for step in counts) for row in range(self.batch_size)]
            ahead.commit(drafts.flatten(1, 2), before.flatten(1, 2), numbers)
            hidden = self._read(ahead._tokens, max(ahead.lengths))
            return self._at(hidden, positions.flatten(1)).unflatten(1, (steps, -1))
        ahead.fork(steps)
        order = torch.arange(steps, device=positions.device)
        is_seen = (order[:-1] < order[:, None])[None, :, :, None]
        places = torch.where(is_seen, before.unsqueeze(1), self.capacity).flatten(0, 1).flatten(1)
        shown = drafts.unsqueeze(1).expand(-1, steps, -1, -1, -1).flatten(0, 1).flatten(1, 2)
        known = [
            sum(step[row] for step in counts[:place])
            for row in range(self.batch_size)
            for place in range(steps)
        ]
        ahead.commit(shown, places, known)
        hidden = ahead.predict(positions=positions.flatten(0, 1))
        self.calls += 1
        return hidden.unflatten(0, (-1, steps))

    def _predict_next(self) -> torch.Tensor:
        """Hidden states of the place after the known tokens of each row, (rows, 1, dim)."""
        return self._at(self._read(self._tokens, max(self.lengths)), self.length[:, None])

    def _read(self, tokens: torch.Tensor, last: int) -> torch.Tensor:
        """Hidden states of the places from that after the tokens of the shortest row to `last`, (rows, n, dim)."""
        config, first = self.model.config, min(self.lengths)
        start, prefix = min(self._next, first), self._conditions["prefix"].shape[1]
        if self._cache is None:
            layers = config.num_hidden_layers + config.decoder_num_hidden_layers
            self._cache = PreallocatedCache(layers, prefix + self.capacity, fixed=True)
        self._cache.truncate(prefix + start if start else 0)
        new = tokens[:, max(start - 1, 0) : min(last, self.capacity - 1)]
        if self.is_guided:
            new = new.repeat(2, 1, 1)
        hidden = self.model.model.next_states(new, start, **self._conditions, past_key_values=self._cache)
        self._next = first + 1  # what a shorter row or a draft showed there does not count
        self.calls += 1
        return hidden[:, first - start :]

    def _at(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of hidden states from `_read`, those at positions (batch, n)."""
        places = (positions - min(self.lengths)).clamp(min=0, max=hidden.shape[1] - 1)
        if self.is_guided:
            places = places.repeat(2, 1)
        return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def commit(self, keep: torch.Tensor, positions: torch.Tensor, count: Sequence[int] | None = None) -> None:
        """
        Makes tokens known.

        Args:
            keep: (batch, n, token_size).
            positions: (batch, n) int64; those equal to `capacity` pad.
            count: tokens of each row that are none of padding; default: n.
        """
        places = positions.unsqueeze(-1).expand(-1, -1, keep.shape[-1])
        self._tokens = self._tokens.scatter(1, places, keep.to(self._tokens.dtype))
        self._known = self._known.scatter(1, positions, True)
        self._known[:, self.capacity] = False
        count = [positions.shape[1]] * self.batch_size if count is None else count
        self.lengths = [length + more for length, more in zip(self.lengths, count, strict=True)]

    def steps_for(self, max_new_tokens: int) -> int:
        """How many steps there are is the decoding's matter; only whole pictures are drawn."""
        if max_new_tokens != self.capacity:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; a masked model draws whole pictures of {self.capacity} tokens: leave "
                "it out."
            )
        return self.capacity

    def fork(self, n: int) -> None:
        self._select([row for row in range(self.batch_size) for _ in range(n)])

    def drop(self, rows: torch.Tensor) -> None:
        gone = set(rows.tolist())
        self._select([row for row in range(self.batch_size) if row not in gone])

    def _select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self._tokens.device)
        paired = torch.cat([index, index + self.batch_size]) if self.is_guided else index
        self._conditions = {name: value.index_select(0, paired) for name, value in self._conditions.items()}
        if self._cache is not None:
            self._cache.select_rows(paired)
        self._tokens, self._known = self._tokens[index], self._known[index]
        self.lengths = [self.lengths[row] for row in rows]
        self.batch_size = len(rows)


def masked_step(
    model: Any,
    tokens: torch.Tensor,
    known: torch.Tensor,
    most: int,
    lengths: torch.Tensor | None,
    conditions: dict[str, torch.Tensor],
    positions: torch.Tensor | None,
    is_guided: bool,
) -> torch.Tensor:
    """
    What the head draws from, (rows, n, dim).

    Args:
        tokens, known: (batch, tokens + 1, token_size) and (batch, tokens + 1) bool.
        most, lengths: how many are known, at most, and in each row (batch,); `None`: as many in all.
        positions: (batch, n), where to predict; `None`: everywhere.
        is_guided: whether rows are paired with unconditional ones.
    """
    capacity = tokens.shape[1] - 1
    # Known positions first, row by row of the picture.
    visible = torch.argsort((~known).to(torch.uint8), dim=1, stable=True)[:, :most]
    valid = None
    if lengths is not None:
        valid = torch.arange(most, device=visible.device) < lengths[:, None]
        visible = torch.where(valid, visible, capacity)
    seen = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    if is_guided:
        seen, visible = seen.repeat(2, 1, 1), visible.repeat(2, 1)
        valid = None if valid is None else valid.repeat(2, 1)
        positions = None if positions is None else positions.repeat(2, 1)
    hidden = model.masked_hidden_states(seen, visible, conditions, valid)
    if positions is None:
        return hidden
    places = positions.clamp(max=capacity - 1).unsqueeze(-1)
    return hidden.gather(1, places.expand(-1, -1, hidden.shape[-1]))
