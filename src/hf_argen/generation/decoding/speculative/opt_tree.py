"""Trees of the largest expected accepted length (OPT-Tree, arXiv 2406.17276)."""

from dataclasses import dataclass

import torch

from .draft_tree import DraftContext, DraftTree, Nodes
from .trees import Tree, check_positive


@dataclass
class OptTree(Tree):
    """
    The drafts whose paths are the likeliest, as many as the budget allows: by the drafter's probabilities no other tree
    of so many nodes has a longer expected accepted length. Levels are added as long as that grows by enough.

    Args:
        nodes: drafts of the tree.
        threshold: by how much the expected length has to grow for another level.
        max_depth: one more than the levels of the tree, at most; the authors draft the last one only to see what it adds.
    """

    nodes: int = 50
    threshold: float = 0.5
    max_depth: int = 10

    def __post_init__(self) -> None:
        check_positive(self, "nodes")
        if self.max_depth < 2:
            raise ValueError(f"max_depth of OptTree is {self.max_depth}; it must be at least 2.")
        if self.threshold < 0:
            raise ValueError(f"threshold of OptTree is {self.threshold}; it must be 0 or above.")

    @property
    def most_drafts(self) -> int:
        return self.nodes

    @property
    def most_expanded(self) -> int:
        return self.nodes * (self.max_depth - 2)

    @property
    def most_depth(self) -> int:
        return self.max_depth - 1

    def grow(self, drafter: Nodes, context: DraftContext, depth: int) -> DraftTree:
        values, tokens = drafter.root_best(self.nodes)
        width, device = tokens.shape[1], tokens.device
        weights, parents = values.exp(), torch.full_like(tokens, -1)
        rows = [_Drafts() for _ in tokens]
        most = min(self.most_depth, depth)
        for level in range(1, most + 1):
            # Whether to go on is decided on the host, which has to know it anyway; so it may choose the drafts, too.
            for row, *drafts in zip(rows, weights.tolist(), tokens.tolist(), parents.tolist(), strict=True):
                if row.grows:
                    row.add(*drafts, self.nodes, self.threshold)
            if level == most or not any(row.grows for row in rows):
                break
            values, ids = drafter.expand_best(tokens, parents, width)
            weights, place = (values.exp() * weights.unsqueeze(-1)).flatten(1).topk(width, dim=-1)
            tokens = ids.flatten(1).gather(1, place)
            parents = place // width + (level - 1) * width
        count = min(self.nodes, *(len(row.weights) for row in rows))
        chosen = torch.tensor([row.best(count) for row in rows], device=device)
        return DraftTree(chosen[:, 0], level, chosen[:, 1], branching=width)


class _Drafts:
    """All drafts of one row in order, level by level, and whether another level may follow."""

    def __init__(self) -> None:
        self.weights: list[float] = []  # the probability of the path to each of them
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.grows = True
        self._expected = 0.0

    def add(
        self, weights: list[float], tokens: list[int], parents: list[int], nodes: int, threshold: float
    ) -> None:
        """A further level, the likeliest first; the parents are numbers among all drafts, or -1."""
        self.weights += weights
        self.tokens += tokens
        self.parents += parents
        expected = sum(sorted(self.weights, reverse=True)[:nodes])
        self.grows = expected - self._expected > threshold
        self._expected = expected

    def best(self, count: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the likeliest; no child is before its parent, which comes first where they are as likely."""
        kept = sorted(sorted(range(len(self.weights)), key=self.weights.__getitem__, reverse=True)[:count])
        place = {draft: i for i, draft in enumerate(kept)}
        return [self.tokens[i] for i in kept], [place.get(self.parents[i], -1) for i in kept]
