"""Drafts copied from the text itself: prompt lookup."""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ... import _compat
from ..base import Request
from .acceptance import Verdict
from .draft_tree import DraftContext, DraftTree
from .drafters import Drafter, Drafting
from .trees import Chain, Tree


@dataclass
class NGram(Drafter):
    """
    Copies what followed the last occurrence of the row's latest tokens, in the prompt or in what was generated. In trees
    of several branches a token counts by how often it followed. Needs no model.

    Args:
        longest: tokens that are looked up, at most; if they have not occurred before, fewer are.
        shortest: the fewest.
    """

    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"NGram looks up {self.shortest} to {self.longest} tokens; shortest must be at least 1 and at most longest."
            )

    def default_tree(self) -> Tree:
        return Chain(length=10)

    def open(self, request: Request, context: DraftContext) -> Drafting:
        return NGramDrafting(self, request, context)


class TextDrafting(Drafting):
    """
    Drafts from statistics of the text alone, row by row.

    Attributes:
        rows: what is known of each row, its ids in `ids`.
    """

    def __init__(self, request: Request, context: DraftContext):
        self.vocab_size = _compat.text_config(request.model).vocab_size
        transcript = context.transcript
        self.device = transcript.prompt.device
        mask = request.inputs.get("attention_mask")
        self.rows = []
        for row, prompt in enumerate(transcript.prompt):
            if mask is not None and prompt.shape[0]:
                prompt = prompt[mask[row] != 0]
            self.rows.append(self.new_row(prompt.tolist()))
        self._paths: list[list[list[int]]] = []  # of each row, the drafts up to every node of this step

    @abstractmethod
    def new_row(self, prompt: list[int]) -> "TextRow":
        """What is known of a row that begins with these ids."""

    def accept(self, verdict: Verdict, taken: list[int]) -> None:
        for row, ids, count in zip(self.rows, verdict.tokens.tolist(), taken, strict=True):
            if count:
                row.extend(ids[:count])

    def root(self) -> torch.Tensor:
        self._paths = [[] for _ in self.rows]
        return torch.stack([self._logits(row, []) for row in self.rows])

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        before = [None] * len(self.rows) if parents is None else parents.tolist()
        logits = []
        for row, paths, ids, above in zip(self.rows, self._paths, tokens.tolist(), before, strict=True):
            for i, token in enumerate(ids):
                parent = len(paths) - 1 if above is None else above[i]
                paths.append([*(paths[parent] if parent >= 0 else []), token])
                logits.append(self._logits(row, paths[-1]))
        return torch.stack(logits).view(*tokens.shape, -1)

    def _logits(self, row: "TextRow", path: list[int]) -> torch.Tensor:
        """(vocab_size,): logarithm of the weight of each token after the row and a path."""
        weights = row.following(path)
        logits = torch.full((self.vocab_size,), -torch.inf, device=self.device)
        tokens = torch.tensor(list(weights), device=self.device)
        logits[tokens] = torch.tensor(
            [float(weight) for weight in weights.values()], device=self.device
        ).log()
        return logits


class TextRow:
    """What is known of the text of one row; `ids` are its tokens."""

    ids: list[int]

    def extend(self, ids: list[int]) -> None:
        """The row has grown."""
        raise NotImplementedError

    def following(self, path: list[int]) -> Mapping[int, float]:
        """Weights above 0 of tokens that may follow the row and a path of drafts; at least one."""
        raise NotImplementedError

    def context(self, path: list[int]) -> tuple[int, ...]:
        """What `following` depends on while the row does not grow; paths that agree in it are looked up once."""
        return tuple(path)


class Occurrences(TextRow):
    """Where the n-grams of one growing sequence have occurred, for n from 0 to `longest`."""

    def __init__(self, longest: int, ids: list[int]):
        self.ids = []
        self.longest = longest
        self._ends: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(longest + 1)]
        self.extend(ids)

    def extend(self, ids: list[int]) -> None:
        """Adds tokens; an n-gram counts from when it is known what follows it."""
        for token in ids:
            end = len(self.ids)
            for n, ends in enumerate(self._ends[: end + 1]):
                ends.setdefault(tuple(self.ids[end - n :]), []).append(end)
            self.ids.append(token)

    def find(self, context: list[int], shortest: int) -> list[int]:
        """The places after the longest n-gram at the end of `context` that has occurred, in order; none: empty."""
        for n in range(min(self.longest, len(context)), shortest - 1, -1):
            if ends := self._ends[n].get(tuple(context[len(context) - n :])):
                return ends
        return []

    def copied(self, length: int, shortest: int) -> list[int]:
        """What followed the last occurrence of the sequence's end; a copy that runs into the end goes on from itself."""
        if not (found := self.find(self.ids[-self.longest :], shortest)):
            return []
        source = self.ids[found[-1] : found[-1] + length]
        return (source * math.ceil(length / len(source)))[:length]

    def following(self, path: list[int]) -> Mapping[int, float]:
        return Counter(self.ids[end] for end in self.find(self.ids[-self.longest :] + path, 0))


class NGramDrafting(TextDrafting):
    """See [`NGram`]."""

    def __init__(self, options: NGram, request: Request, context: DraftContext):
        self.options = options
        super().__init__(request, context)

    def new_row(self, prompt: list[int]) -> Occurrences:
        return Occurrences(self.options.longest, prompt)

    def ready(self, length: int) -> DraftTree | None:
        copies = [row.copied(length, self.options.shortest) for row in self.rows]
        if not any(copies):
            return DraftTree.none(torch.zeros(len(copies), device=self.device))
        # A row without a copy gets drafts that are as good as any.
        filled = [copy or row.ids[-1:] * length for copy, row in zip(copies, self.rows, strict=True)]
        return DraftTree(torch.tensor(filled, device=self.device), length)
