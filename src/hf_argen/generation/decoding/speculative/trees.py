"""Which drafts are tried together: a chain, independent chains, and the trees of Medusa (arXiv 2401.10774)."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...sampling import categorical, without_replacement
from ...stored import Part
from .choices import paths_of
from .draft_tree import DraftContext, DraftTree, Nodes


@dataclass
class Tree(Part, ABC):
    """Base of the shapes in which drafts are arranged."""

    kind: ClassVar[str] = "tree"

    @property
    @abstractmethod
    def most_drafts(self) -> int:
        """Drafts of a row in one step, at most."""

    @property
    @abstractmethod
    def most_depth(self) -> int:
        """Drafts that follow each other, at most."""

    @property
    def most_expanded(self) -> int:
        """Drafts of a row that the drafter continues in one step, at most."""
        return self.most_drafts

    @property
    def independent(self) -> bool:
        """Whether drafts of a request that samples are drawn independently, as `SpecTr` needs."""
        return False

    @abstractmethod
    def grow(self, drafter: Nodes, context: DraftContext, depth: int) -> DraftTree:
        """Drafts of one step, no path longer than `depth`, which is 1 or more."""


def check_positive(owner: Tree, *names: str) -> None:
    """Refuses options that are below 1, a node budget of 0 for example."""
    for name in names:
        if getattr(owner, name) < 1:
            raise ValueError(
                f"{name} of {type(owner).__name__} is {getattr(owner, name)}; it must be at least 1."
            )


@dataclass
class Chain(Tree):
    """
    One draft after another: drawn from the drafter where the request samples, its likeliest tokens otherwise.

    Args:
        length: drafts of a step, at most.
        confidence: from 0 to below 1; the chain ends with the first draft that is less probable to the drafter, in a batch
            when every row has had one. What follows a doubtful draft is rarely accepted, and costs a call of the drafter.
            As in transformers' `assistant_confidence_threshold` (arXiv 2405.04304 learns when to end). The host reads the
            probabilities of each draft, which on a GPU waits for it. Default: chains end at `length`.
    """

    length: int = 5
    confidence: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "length")
        if not 0.0 <= self.confidence < 1.0:
            raise ValueError(f"confidence of Chain is {self.confidence}; it must be from 0 to below 1.")

    @property
    def most_drafts(self) -> int:
        return self.length

    @property
    def most_depth(self) -> int:
        return self.length

    @property
    def independent(self) -> bool:
        return True

    def grow(self, drafter: Nodes, context: DraftContext, depth: int) -> DraftTree:
        if (ready := drafter.ready(min(depth, self.length))) is not None:
            return ready
        logits = drafter.root()[:, None]
        tokens = logits.new_zeros(len(logits), 0, dtype=torch.long)
        probs: list[torch.Tensor] = []
        doubtful = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for i in range(min(depth, self.length)):
            if i:
                logits = drafter.expand(tokens[:, -1:], None)
            scores = context.transcript.process(logits, tokens, nodes=[i])
            if context.do_sample:
                probs.append(scores.softmax(dim=-1))
                drawn = categorical(probs[-1], context.generator)
            else:
                drawn = scores.argmax(dim=-1)
            tokens = torch.cat([tokens, drawn], dim=1)
            if self.confidence:
                # Decided by drafts that stay: they are drawn from the drafter as ever, so nothing is biased.
                log_prob = scores[:, 0].gather(1, drawn)[:, 0] - scores[:, 0].logsumexp(dim=-1)
                doubtful = doubtful | (log_prob < math.log(self.confidence))
                if bool(doubtful.all()):
                    break
        return DraftTree(tokens, tokens.shape[1], probs=torch.cat(probs, dim=1) if probs else None)


@dataclass
class IndependentSequences(Tree):
    """
    Several chains next to each other, drawn independently (SpecTr, arXiv 2310.15141; SpecInfer, arXiv 2305.09781).
    Where the request does not sample they begin with the likeliest tokens and go on greedily.

    Args:
        k: chains.
        length: drafts of each.
    """

    k: int = 4
    length: int = 4

    def __post_init__(self) -> None:
        check_positive(self, "k", "length")

    @property
    def most_drafts(self) -> int:
        return self.k * self.length

    @property
    def most_depth(self) -> int:
        return self.length

    @property
    def independent(self) -> bool:
        return True

    def grow(self, drafter: Nodes, context: DraftContext, depth: int) -> DraftTree:
        length = min(depth, self.length)
        logits = drafter.root()[:, None]
        k = self.k if context.do_sample else min(self.k, logits.shape[-1])
        place = torch.arange(k, device=logits.device)
        levels: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        for level in range(length):
            if level:
                before = place - k if level == 1 else place + k * (level - 2)
                parents = before.clamp(min=-1).expand(len(logits), -1)
                logits = drafter.expand(levels[-1], parents)
            nodes = [0] if level == 0 else range(1 + k * (level - 1), 1 + k * level)
            tokens = torch.cat([logits.new_zeros(len(logits), 0, dtype=torch.long), *levels], dim=1)
            scores = context.transcript.process(logits, tokens, self._parents(level, k, tokens), nodes)
            if context.do_sample:
                probs.append(scores.softmax(dim=-1))
                levels.append(categorical(probs[-1].expand(-1, k, -1), context.generator))
            elif level == 0:
                levels.append(scores[:, 0].topk(k).indices)
            else:
                levels.append(scores.argmax(dim=-1))
        tokens = torch.cat(levels, dim=1)
        return DraftTree(
            tokens,
            length,
            self._parents(length, k, tokens),
            torch.cat(probs, dim=1) if probs else None,
            candidates=self._candidates(levels),
        )

    @staticmethod
    def _parents(levels: int, k: int, like: torch.Tensor) -> torch.Tensor:
        """(1, levels * k): every draft continues that of its chain on the level before."""
        return (torch.arange(levels * k, device=like.device) - k).clamp(min=-1)[None]

    @staticmethod
    def _candidates(levels: list[torch.Tensor]) -> torch.Tensor:
        """
        Chains that begin alike are tried together: what follows a node are the next drafts of all chains that reach it,
        each as the first node with the same path.
        """
        batch, k = levels[0].shape
        device = levels[0].device
        table = torch.zeros(batch, len(levels) * k + 1, k, dtype=torch.long, device=device)
        alike = torch.ones(batch, k, k, dtype=torch.bool, device=device)
        here = torch.zeros(
            batch, k, dtype=torch.long, device=device
        )  # the node that stands for each chain so far
        for level, tokens in enumerate(levels):
            alike = alike & (tokens[:, :, None] == tokens[:, None, :])
            following = alike.int().argmax(dim=-1) + level * k + 1
            nodes = (
                torch.zeros(1, dtype=torch.long, device=device)
                if level == 0
                else here.new_tensor(range((level - 1) * k + 1, level * k + 1))
            )
            is_here = here[:, None, :] == nodes[None, :, None]
            table[:, nodes] = torch.where(is_here, following[:, None, :], 0)
            here = following
        return table


@dataclass
class _Plan:
    """
    How the drafts of a static tree come about, level by level.

    Attributes:
        parents: of every draft, -1 for the row.
        levels: for each level: the nodes that have children there, and for each draft of the level whose child it is
            (a place among these nodes) and of which rank.
        fed: for each level but the last: which of its drafts have children, and the number of the parent of each among
            all drafts that have any.
        branching: the most children of a node.
    """

    parents: list[int]
    levels: list[tuple[list[int], list[int], list[int]]]
    fed: list[tuple[list[int], list[int]]]
    branching: int


@dataclass
class StaticTree(Tree):
    """
    A tree of which every node has a fixed place: the children of a node are the drafter's likeliest tokens there.

    Args:
        choices: paths of ranks, as Medusa's and EAGLE's: [0, 2] is the third child of the first child of the row. Or
            the name of a tree of Medusa's; the default is that for models without one of their own, 63 nodes.
        draw: where the request samples, draw the children without replacement instead of taking the likeliest ones.
    """

    choices: list[list[int]] | str = "mc_sim_7b_63"
    draw: bool = True

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError(
                "StaticTree has no choices, so its node budget is 0; give at least one path, as [[0]]."
            )
        paths = {
            tuple(path)
            for path in (paths_of(self.choices) if isinstance(self.choices, str) else self.choices)
        }
        for path in paths:
            if path and path[:-1] and path[:-1] not in paths:
                raise ValueError(
                    f"StaticTree has the path {list(path)} but not {list(path[:-1])}, which it continues."
                )
            if not path or min(path) < 0:
                raise ValueError(
                    f"StaticTree has the path {list(path)}; a path is a list of ranks, 0 or above."
                )
        self._paths = sorted(paths, key=lambda path: (len(path), path))
        self._plans: dict[tuple[int, int], _Plan] = {}

    @property
    def most_drafts(self) -> int:
        return len(self._paths)

    @property
    def most_depth(self) -> int:
        return len(self._paths[-1])

    def plan(self, depth: int, vocab_size: int) -> _Plan:
        """The tree without paths that are too long, or of ranks that no token has."""
        if (depth, vocab_size) not in self._plans:
            self._plans[depth, vocab_size] = self._planned(depth, vocab_size)
        return self._plans[depth, vocab_size]

    def _planned(self, depth: int, vocab_size: int) -> _Plan:
        paths = [path for path in self._paths if len(path) <= depth and max(path) < vocab_size]
        number = {(): -1} | {path: i for i, path in enumerate(paths)}
        has_children = {path[:-1] for path in paths}
        fed_number = {path: i for i, path in enumerate(path for path in paths if path in has_children)}
        levels, fed = [], []
        for level in range(1, len(paths[-1]) + 1):
            own = [path for path in paths if len(path) == level]
            above = sorted({path[:-1] for path in own}, key=lambda path: number[path])
            levels.append(
                (
                    [number[path] + 1 for path in above],
                    [above.index(path[:-1]) for path in own],
                    [path[-1] for path in own],
                )
            )
            inner = [path for path in own if path in has_children]
            fed.append(
                ([own.index(path) for path in inner], [fed_number.get(path[:-1], -1) for path in inner])
            )
        return _Plan(
            [number[path[:-1]] for path in paths],
            levels,
            fed,
            max(sum(path[:-1] == above for path in paths) for above in has_children),
        )

    def grow(self, drafter: Nodes, context: DraftContext, depth: int) -> DraftTree:
        logits = drafter.root()[:, None]
        plan = self.plan(min(depth, self.most_depth), logits.shape[-1])
        draws = context.do_sample and self.draw
        parents = torch.tensor(plan.parents, device=logits.device)[None]
        tokens = logits.new_zeros(len(logits), 0, dtype=torch.long)
        probs = logits.new_zeros(len(logits), plan.levels[-1][0][-1] + 1, logits.shape[-1]) if draws else None
        for level, (above, whose, ranks) in enumerate(plan.levels):
            scores = context.transcript.process(logits, tokens, parents[:, : tokens.shape[1]], above)
            if draws:
                probs[:, above] = scores.softmax(dim=-1)
                picked = without_replacement(probs[:, above], max(ranks) + 1, context.generator)
            else:
                picked = scores.topk(max(ranks) + 1, dim=-1).indices
            new = picked[:, whose, ranks]
            tokens = torch.cat([tokens, new], dim=1)
            if level + 1 < len(plan.levels):
                inner, before = plan.fed[level]
                logits = drafter.expand(new[:, inner], parents.new_tensor(before).expand(len(new), -1))
        return DraftTree(tokens, len(plan.levels), parents, probs, False, branching=plan.branching)
