"""An adaptive table of three tokens, explored as a tree (ADED, arXiv 2407.12021)."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ..base import Request
from .draft_tree import DraftContext, DraftTree, Nodes
from .drafters import Drafter, Drafting
from .ngram import TextDrafting, TextRow
from .trees import Tree, check_positive

Table = dict[tuple[int, int], dict[int, float]]


@dataclass
class AdaptiveNGram(Drafter):
    """
    A table of which token follows which two, that starts from a corpus or empty and learns from every text it sees while
    that is written. Needs no model. What it learns stays with the row.

    Args:
        corpus: a .npy file of token ids, (tokens,) of any kind of integers, to count beforehand; default: none.
        step: by how much a weight grows whenever its three tokens are among the latest; those of the corpus are
            probabilities.
        window: tokens that count as the latest.
        most: the largest weight.
        kept: tokens that are kept after two of the corpus, the likeliest ones.
    """

    corpus: str | None = None
    step: float = 0.04
    window: int = 16
    most: float = 3.0
    kept: int = 12

    def __post_init__(self) -> None:
        for name, least in (("window", 3), ("kept", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} of AdaptiveNGram is {getattr(self, name)}; it must be at least {least}."
                )
        if not 0 < self.step <= self.most:
            raise ValueError(
                f"step of AdaptiveNGram is {self.step}; it must be above 0 and at most `most`, {self.most}."
            )

    def default_tree(self) -> Tree:
        return SearchTree()

    def open(self, request: Request, context: DraftContext) -> Drafting:
        return AdaptiveDrafting(self, request, context)


@lru_cache(maxsize=4)
def counted(path: str, modified: float, kept: int) -> Table:
    """The table of a corpus: of every two tokens the likeliest ones after them, with their probabilities."""
    ids = np.load(path, allow_pickle=False)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"The corpus {path!r} has the shape {ids.shape} of {ids.dtype}; give token ids in one row."
        )
    triples = Counter(zip(ids[:-2].tolist(), ids[1:-1].tolist(), ids[2:].tolist(), strict=True))
    counts: dict[tuple[int, int], dict[int, int]] = {}
    for (first, second, third), number in triples.items():
        counts.setdefault((first, second), {})[third] = number
    table: Table = {}
    for pair, after in counts.items():
        total = sum(after.values())
        best = sorted(after.items(), key=lambda item: (-item[1], item[0]))[:kept]
        table[pair] = {token: number / total for token, number in best}
    return table


class AdaptiveRow(TextRow):
    """The table as one row has changed it."""

    def __init__(self, options: AdaptiveNGram, base: Table, ids: list[int]):
        self.options, self.base = options, base
        self.own: Table = {}
        self.ids = list(ids)
        self._learn(self.ids)

    def extend(self, ids: list[int]) -> None:
        self.ids += ids
        self._learn(self.ids[-self.options.window :])

    def _learn(self, ids: list[int]) -> None:
        for first, second, third in zip(ids, ids[1:], ids[2:], strict=False):
            pair = (first, second)
            after = self.own.setdefault(pair, dict(self.base.get(pair, {})))
            after[third] = min(after.get(third, 0.0) + self.options.step, self.options.most)

    def after(self, pair: tuple[int, int]) -> Mapping[int, float]:
        """Weights of the tokens after two; none where these were never seen."""
        return self.own.get(pair) or self.base.get(pair, {})

    def following(self, path: list[int]) -> Mapping[int, float]:
        context = self.ids[-2:] + path
        found = self.after((context[-2], context[-1])) if len(context) > 1 else {}
        return found or Counter(self.ids[-self.options.window :])


class AdaptiveDrafting(TextDrafting):
    """See [`AdaptiveNGram`]."""

    def __init__(self, options: AdaptiveNGram, request: Request, context: DraftContext):
        self.options, self.base = options, {}
        if options.corpus is not None:
            path = Path(options.corpus)
            if not path.is_file():
                raise ValueError(f"The corpus {options.corpus!r} does not exist; check the path.")
            self.base = counted(str(path), path.stat().st_mtime, options.kept)
        super().__init__(request, context)

    def new_row(self, prompt: list[int]) -> AdaptiveRow:
        return AdaptiveRow(self.options, self.base, prompt)


# The tree


@dataclass
class Place:
    """A node of the search."""

    token: int
    prior: float
    parent: int
    depth: int
    visits: int = 0
    value: float = 0.0
    children: list[int] | None = None  # `None`: not looked at yet
    path: list[int] = field(default_factory=list)


@dataclass
class SearchTree(Tree):
    """
    A tree that is explored as in Monte Carlo tree search: where to look next is weighed between what has paid and what
    has hardly been tried (PUCT), and the nodes that were visited most are verified. For `NGram` and `AdaptiveNGram`.
    Paths are valued to the full depth by their likeliest continuation instead of a drawn one.

    Args:
        nodes: drafts of the tree, at most.
        depth: drafts that follow each other, at most.
        iterations: of the search.
        exploration: how much is tried that has hardly been.
        scale: visits after which that begins to grow.
    """

    nodes: int = 32
    depth: int = 4
    iterations: int = 150
    exploration: float = 32.0
    scale: float = 8.0

    def __post_init__(self) -> None:
        check_positive(self, "nodes", "depth", "iterations")

    @property
    def most_drafts(self) -> int:
        return self.nodes

    @property
    def most_depth(self) -> int:
        return self.depth

    def grow(self, drafter: Nodes, context: DraftContext, depth: int) -> DraftTree:
        if not isinstance(drafter, TextDrafting):
            raise ValueError("SearchTree explores tables of text; use it with AdaptiveNGram or NGram.")
        found = [self.search(row, min(depth, self.depth)) for row in drafter.rows]
        size = max(len(tokens) for tokens, _ in found)
        for row, (tokens, parents) in zip(drafter.rows, found, strict=True):
            tokens += row.ids[-1:] * (size - len(tokens))  # filled up with drafts as good as any
            parents += [-1] * (size - len(parents))
        tokens, parents = (torch.tensor([one[i] for one in found], device=drafter.device) for i in range(2))
        branching = max(max(Counter(row).values()) for row in parents.tolist())
        return DraftTree(tokens, min(depth, self.depth), parents, branching=branching)

    def search(self, row: TextRow, depth: int) -> tuple[list[int], list[int]]:
        """Tokens of one row's tree and the draft that each continues, -1 for the row."""
        places = [Place(-1, 0.0, -1, 0)]
        for _ in range(self.iterations):
            at = 0
            while places[at].children and places[at].depth < depth:
                at = self._next(places, at)
            if places[at].children is None and places[at].depth < depth:
                self._open(places, at, row)
                at = places[at].children[0] if places[at].children else at
            value = self._value(places[at], row, depth, places)
            while at >= 0:
                places[at].visits += 1
                places[at].value += value
                at = places[at].parent
        order = sorted(range(1, len(places)), key=lambda i: (-places[i].visits, -places[i].prior, i))
        kept = sorted(
            order[: self.nodes]
        )  # a parent is visited as often as its children together, and comes before
        number = {0: -1} | {place: i for i, place in enumerate(kept)}
        return [places[i].token for i in kept], [number.get(places[i].parent, -1) for i in kept]

    @staticmethod
    def _open(places: list[Place], at: int, row: TextRow) -> None:
        here = places[at]
        weights = row.following(here.path)
        best = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
        here.children = []
        for token, weight in best:
            here.children.append(len(places))
            places.append(Place(token, weight, at, here.depth + 1, path=[*here.path, token]))

    def _next(self, places: list[Place], at: int) -> int:
        total = places[at].visits
        rate = self.exploration + math.log((total + self.scale + 1) / self.scale)

        def worth(child: int) -> float:
            one = places[child]
            gained = one.value / one.visits if one.visits else 0.0
            return gained + rate * one.prior * math.sqrt(total) / (1 + one.visits)

        return max(places[at].children, key=worth)

    @staticmethod
    def _value(place: Place, row: TextRow, depth: int, places: list[Place]) -> float:
        """The weights on the way to a node and on the likeliest way on from it."""
        total, at = 1.0, place
        while at.parent >= 0:
            total += at.prior
            at = places[at.parent]
        path = list(place.path)
        while len(path) < depth:
            token, weight = max(row.following(path).items(), key=lambda item: (item[1], -item[0]))
            total += weight
            path.append(token)
        return total
