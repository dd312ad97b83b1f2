"""
The token sequences of one request: what processors see of them, when each row stops, what a streamer hears of it.

Decodings that commit several tokens at once give the same output as one token at a time, because everything that reads
a sequence reads each row's own, token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import BaseStreamer

from .sampling import Generators, draw
from .warping import warped

# Processors that look at the scores alone, and so can run on all nodes of all rows at once.
CONTEXT_FREE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


@dataclass
class Transcript:
    """
    Args:
        prompt: (batch, length) ids that processors and criteria see before the generated ones; length 0 for pictures.
        logits_processor, stopping_criteria: as in transformers.
        limit: generated tokens at which a row ends whatever the criteria say; `None` for no limit.
        pad_token_id: what follows a row that has ended.
        streamer: hears every token of the batch once all unfinished rows have it.
        keeps: which of "logits" and "scores" to keep for the output.
        goes_along: rows that have ended grow with the others, as in transformers; otherwise they stay as they are.
    """

    prompt: torch.Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    limit: int | None = None
    pad_token_id: int = 0
    streamer: BaseStreamer | None = None
    keeps: Sequence[str] = ()
    goes_along: bool = False
    kept: dict[str, list[list[torch.Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.batch_size, self.start = self.prompt.shape
        room = self.limit if self.limit is not None else 64
        self._ids = self._room(self.start + room)
        self._ids[:, : self.start] = self.prompt
        self.lengths = [0] * self.batch_size
        self.finished = [self.limit == 0] * self.batch_size
        self._pads_finished = any(isinstance(one, EosTokenCriteria) for one in self.stopping_criteria)
        self._ends = self._plain_ends()
        self._published = 0
        self.best = torch.zeros(self.batch_size, device=self.prompt.device)
        self.kept = {name: [[] for _ in range(self.batch_size)] for name in self.keeps}

    def _plain_ends(self) -> tuple[set[int], int] | None:
        """The tokens and the length at which a row ends, if nothing else ends one; otherwise `None`."""
        tokens: set[int] = set()
        length = self.start + (1 << 30 if self.limit is None else self.limit)
        for criterion in self.stopping_criteria:
            if type(criterion) is EosTokenCriteria:
                tokens.update(criterion.eos_token_id.reshape(-1).tolist())
            elif type(criterion) is MaxLengthCriteria:
                length = min(length, criterion.max_length)
                if (criterion.max_position_embeddings or length) < length:
                    return None  # it warns
            else:
                return None
        return tokens, length

    def _room(self, length: int) -> torch.Tensor:
        return self.prompt.new_full((self.batch_size, length), self.pad_token_id, dtype=torch.long)

    @property
    def is_done(self) -> bool:
        """Whether all rows have ended."""
        return all(self.finished)

    @property
    def is_even(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def remaining(self) -> int:
        """Tokens that the row with the most room can still take; a large number without limit."""
        if self.limit is None:
            return 1 << 30
        rows = zip(self.lengths, self.finished, strict=True)
        return max((self.limit - length for length, ended in rows if not ended), default=0)

    def last(self) -> torch.Tensor:
        """(batch, 1) int64, the last token of each row."""
        if self.is_even:
            place = self.start + self.lengths[0]
            return self._ids[:, place - 1 : place]
        places = torch.tensor(self.lengths, device=self._ids.device)[:, None] + self.start - 1
        return self._ids.gather(1, places)

    def row(self, row: int) -> list[int]:
        """All ids of a row, those of the prompt and its padding included."""
        return self._ids[row, : self.start + self.lengths[row]].tolist()

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """(batch,) int64, the generated token of each row at its place (batch,); negative places reach the prompt."""
        return self._ids.gather(1, (places + self.start).clamp(min=0)[:, None])[:, 0]

    def sequences(self) -> torch.Tensor:
        """(batch, tokens) int64: the generated ids, filled up with the pad token."""
        return self._ids[:, self.start : self.start + max(self.lengths)]

    # Scores

    def process(
        self,
        logits: torch.Tensor,
        drafts: torch.Tensor | None = None,
        parents: torch.Tensor | None = None,
        nodes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """
        Logits through the logits processors.

        Args:
            logits: (batch, n, vocab_size) float32, of what follows the nodes.
            drafts: (batch, m) int64, tokens that may follow the row; default: none.
            parents: (batch, m) int64, the draft that each of them continues, -1 for the row; default: a chain.
            nodes: whose logits these are: 0 is the row as it is, i + 1 its i-th draft; default: the first n.

        Returns:
            scores of the same shape.
        """
        scores = logits
        paths: list[list[list[int]]] | None = None
        for is_free, group in groupby(self.logits_processor, key=lambda one: type(one) in CONTEXT_FREE):
            if is_free:
                empty = self.prompt.new_zeros(scores.shape[0] * scores.shape[1], 0)
                scores = warped(list(group), scores.reshape(-1, scores.shape[-1]), empty).view(scores.shape)
            else:
                processors = LogitsProcessorList(group)
                if paths is None:
                    paths = self._paths(drafts, parents, range(scores.shape[1]) if nodes is None else nodes)
                columns = [self._in_context(processors, scores[:, i], path) for i, path in enumerate(paths)]
                scores = torch.stack(columns, dim=1)
        return scores

    def _paths(
        self, drafts: torch.Tensor | None, parents: torch.Tensor | None, nodes: Sequence[int]
    ) -> list[list[list[int]]]:
        """For each node and each row the drafts from the end of the row to the node."""
        if drafts is None:
            return [[[] for _ in range(self.batch_size)] for _ in nodes]
        rows = drafts.tolist()
        if parents is None:
            return [[row[:node] for row in rows] for node in nodes]
        before = parents.expand(self.batch_size, -1).tolist()

        def path(row: int, node: int) -> list[int]:
            found: list[int] = []
            while node > 0:
                found.append(rows[row][node - 1])
                node = before[row][node - 1] + 1
            return found[::-1]

        return [[path(row, node) for row in range(self.batch_size)] for node in nodes]

    def _in_context(
        self, processors: LogitsProcessorList, scores: torch.Tensor, paths: list[list[int]]
    ) -> torch.Tensor:
        """Scores (batch, vocab_size) after the rows and each row's path of drafts."""

        def context(row: int, rows: slice) -> torch.Tensor:
            ids = self._ids[rows, : self.start + self.lengths[row]]
            return torch.cat([ids, ids.new_tensor(paths[rows])], dim=1) if paths[row] else ids

        if self.is_even and len({len(path) for path in paths}) == 1:
            return processors(context(0, slice(None)), scores)
        # Rows of unequal length make no batch. A processor may ask which row of the batch it sees, so it sees as many.
        parts = []
        for row in range(self.batch_size):
            ids = context(row, slice(row, row + 1)).repeat(self.batch_size, 1)
            own = scores[row : row + 1].repeat(self.batch_size, 1)
            parts.append(processors(ids, own)[row])
        return torch.stack(parts)

    def note(self, scores: torch.Tensor, counts: Sequence[int] | None = None) -> None:
        """
        Remembers in `best` (batch,) float32 the lowest of the best scores that tokens were drawn from, which shows afterwards
        whether a draw was possible everywhere.

        Args:
            scores: (batch, k, vocab_size), or of every place the best one (batch, k); log probabilities of what was drawn do, too.
            counts: from how many of the places each row took its token; default: from all, unless it has ended.
        """
        best = scores.amax(dim=-1) if scores.ndim == 3 else scores
        width = best.shape[1]
        if counts is None:
            counts = [0 if ended else width for ended in self.finished]
        if min(counts) < width:
            taken = torch.tensor(counts, device=best.device)[:, None]
            best = torch.where(torch.arange(width, device=best.device) < taken, best, 0.0)
        self.best = torch.minimum(self.best, best.amin(dim=1))

    # Growth

    def append(
        self,
        tokens: torch.Tensor,
        counts: Sequence[int] | None = None,
        logits: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> list[int]:
        """
        Adds tokens to the rows that have not ended, one after another, and cuts each row where it stops.

        Args:
            tokens: (batch, k) int64.
            counts: how many of them each row takes; default: all.
            logits, scores: (batch, k, vocab_size) that they were drawn from, for the output.

        Returns:
            how many each row took.
        """
        counts = [tokens.shape[1]] * self.batch_size if counts is None else list(counts)
        before = list(self.lengths)
        if self._ends is not None and not self.goes_along and not self.keeps:
            self._append_blocks(tokens, counts, *self._ends)
            counts = []
        for place in range(max(counts, default=0)):
            rows = [r for r in range(self.batch_size) if not self.finished[r] and counts[r] > place]
            if not rows:
                break
            if self.is_even and (self.goes_along or len(rows) == self.batch_size):
                self._append_to_all(tokens[:, place])
            else:
                self._append_to_some(tokens[:, place], rows)
            for name, value in (("logits", logits), ("scores", scores)):
                if name in self.kept and value is not None:
                    for row in range(self.batch_size) if self.goes_along else rows:
                        self.kept[name][row].append(value[row, place])
        self._publish()
        return [length - old for length, old in zip(self.lengths, before, strict=True)]

    def _append_blocks(
        self, tokens: torch.Tensor, counts: Sequence[int], ends: set[int], longest: int
    ) -> None:
        """All tokens at once, up to the first at which a row ends."""
        self._make_room(max(counts, default=0))
        for row, ids in enumerate(tokens.tolist()):
            if self.finished[row] or not counts[row]:
                continue
            start = self.start + self.lengths[row]
            number = max(
                min(counts[row], longest - start), 1
            )  # a criterion is asked after a token, not before
            stop = next((i + 1 for i, token in enumerate(ids[:number]) if token in ends), None)
            number = number if stop is None else stop
            self._ids[row, start : start + number] = tokens[row, :number]
            self.lengths[row] += number
            self.finished[row] = stop is not None or start + number >= longest

    def _append_to_some(self, tokens: torch.Tensor, rows: list[int]) -> None:
        """A token, out of (batch,), for each of `rows`."""
        self._make_room()
        for row in rows:
            end = self.start + self.lengths[row]
            self._ids[row, end] = tokens[row]
            self.lengths[row] += 1
            self.finished[row] = self._stops(slice(row, row + 1), end + 1)[0] or self._is_full(row)

    def _append_to_all(self, tokens: torch.Tensor) -> None:
        """A token (batch,) for every row of the even batch, those that have ended included."""
        self._make_room()
        end = self.start + self.lengths[0]
        if self._pads_finished and any(self.finished):
            ended = torch.tensor(self.finished, device=tokens.device)
            tokens = torch.where(ended, self.pad_token_id, tokens)
        self._ids[:, end] = tokens
        self.lengths = [length + 1 for length in self.lengths]
        stops = self._stops(slice(None), end + 1)
        self.finished = [
            ended or stop or self._is_full(row)
            for row, (ended, stop) in enumerate(zip(self.finished, stops, strict=True))
        ]

    def _make_room(self, more: int = 1) -> None:
        longest = self.start + max(self.lengths) + more
        if longest > self._ids.shape[1]:
            grown = self._room(2 * longest)
            grown[:, : self._ids.shape[1]] = self._ids
            self._ids = grown

    def _is_full(self, row: int) -> bool:
        return self.limit is not None and self.lengths[row] >= self.limit

    def _stops(self, rows: slice, end: int) -> list[bool]:
        if not self.stopping_criteria:
            return [False] * len(range(*rows.indices(self.batch_size)))
        return self.stopping_criteria(self._ids[rows, :end], None).tolist()

    # What others hear

    def _publish(self) -> None:
        if self.streamer is None:
            return
        open_rows = [length for length, ended in zip(self.lengths, self.finished, strict=True) if not ended]
        ready = min(open_rows) if open_rows else max(self.lengths)
        for place in range(self._published, ready):
            self.streamer.put(self._ids[:, self.start + place].cpu())
        self._published = max(self._published, ready)

    def stacked(self, name: str) -> torch.Tensor:
        """(batch, tokens, vocab_size): the kept "logits" or "scores"; zeros after the end of a row."""
        rows = [torch.stack(row) for row in self.kept[name]]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def choose(scores: torch.Tensor, do_sample: bool, generator: Generators = None) -> torch.Tensor:
    """Scores (batch, ..., vocab_size) to tokens (batch, ...): drawn, or the best ones."""
    return draw(scores, generator) if do_sample else scores.argmax(dim=-1)
