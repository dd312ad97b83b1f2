"""An adaptive table of three tokens, explored as a tree (ADED, arXiv 2407.12021)."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
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

    def context(self, path: list[int]) -> tuple[int, ...]:
        return tuple((self.ids[-2:] + path)[-2:])

    def following(self, path: list[int]) -> Mapping[int, float]:
        context = self.context(path)
        found = self.after((context[0], context[1])) if len(context) == 2 else {}
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


class Search:
    """
    The search for one row's tree. Places are numbers, the row is place 0; what is known of each stands in lists.

    Args:
        tree: its options.
        row: what is known of the text.
        depth: of the tree.
    """

    def __init__(self, tree: "SearchTree", row: TextRow, depth: int):
        self.tree, self.row, self.depth = tree, row, depth
        self.token, self.prior, self.parent = [-1], [0.0], [-1]
        self.level, self.visits, self.gain = [0], [0], [0.0]
        self.children: list[range | None] = [None]  # `None`: not looked at yet
        self.worth: list[float | None] = [None]  # what a visit gains
        # After a context, the likeliest first.
        self._ranked: dict[tuple[int, ...], list[tuple[int, float]]] = {}

    def run(self) -> None:
        """Visits a place in every iteration."""
        for _ in range(self.tree.iterations):
            at = 0
            while self.children[at] and self.level[at] < self.depth:
                at = self._next(at)
            if self.children[at] is None and self.level[at] < self.depth:
                self._open(at)
                at = self.children[at][0] if self.children[at] else at
            if (worth := self.worth[at]) is None:
                worth = self.worth[at] = self._value(at)
            while at >= 0:
                self.visits[at] += 1
                self.gain[at] += worth
                at = self.parent[at]

    def _path(self, at: int) -> list[int]:
        """The tokens of a place, from the first draft."""
        path = []
        while at:
            path.append(self.token[at])
            at = self.parent[at]
        return path[::-1]

    def _after(self, path: list[int]) -> list[tuple[int, float]]:
        """Tokens that may follow with their weights, the likeliest first."""
        context = self.row.context(path)
        if (found := self._ranked.get(context)) is None:
            weights = self.row.following(path)
            found = self._ranked[context] = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
        return found

    def _open(self, at: int) -> None:
        after = self._after(self._path(at))
        first, level, number = len(self.token), self.level[at] + 1, len(after)
        self.token += [token for token, _ in after]
        self.prior += [weight for _, weight in after]
        self.parent += [at] * number
        self.level += [level] * number
        self.visits += [0] * number
        self.gain += [0.0] * number
        self.children += [None] * number
        self.worth += [None] * number
        self.children[at] = range(first, first + number)

    def _next(self, at: int) -> int:
        """The child to look at: the first of those that are worth the most."""
        children = self.children[at]
        if len(children) == 1:
            return children[0]
        total = self.visits[at]
        rate = self.tree.exploration + math.log((total + self.tree.scale + 1) / self.tree.scale)
        root = math.sqrt(total)
        visits, gain, prior = self.visits, self.gain, self.prior
        best, most = children[0], -math.inf
        for child in children:
            times = visits[child]
            worth = (gain[child] / times if times else 0.0) + rate * prior[child] * root / (1 + times)
            if worth > most:
                best, most = child, worth
            if not times:  # those after it are less likely, and have not been visited either
                break
        return best

    def _value(self, at: int) -> float:
        """The weights on the way to a place and on the likeliest way on from it."""
        path, total = self._path(at), 1.0
        while self.parent[at] >= 0:
            total += self.prior[at]
            at = self.parent[at]
        while len(path) < self.depth:
            token, weight = self._after(path)[0]
            total += weight
            path.append(token)
        return total

    def kept(self) -> tuple[list[int], list[int]]:
        """Tokens of the places visited most and the draft that each continues, -1 for the row."""
        visits, prior = self.visits, self.prior
        places = [i for i in range(1, len(visits)) if visits[i]]
        if len(places) < self.tree.nodes:
            places = range(1, len(visits))
        order = sorted(places, key=lambda i: (-visits[i], -prior[i], i))
        # A parent is visited as often as its children together, and comes before.
        kept = sorted(order[: self.tree.nodes])
        number = {0: -1} | {place: i for i, place in enumerate(kept)}
        return [self.token[i] for i in kept], [number.get(self.parent[i], -1) for i in kept]


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
        search = Search(self, row, depth)
        search.run()
        return search.kept()
