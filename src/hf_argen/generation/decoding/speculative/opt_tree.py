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
        max_depth: levels that are drafted, at most; the tree has fewer, the last one only shows what it would add.
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
        return self.nodes * (self.max_depth - 1)

    @property
    def most_depth(self) -> int:
        return self.max_depth - 1

    def grow(self, drafter: Nodes, context: DraftContext, depth: int) -> DraftTree:
        values, tokens = drafter.root_best(self.nodes)
        width = tokens.shape[1]
        layers = [(tokens, values.exp(), torch.full_like(tokens, -1))]
        expected = [0.0] * len(tokens)
        levels = [0] * len(tokens)  # of each row's tree; 0: still growing
        most = min(self.max_depth, depth + 1)
        while True:
            tokens, weights, parents = layers[-1]
            fed = parents if len(layers) == 1 else parents + (len(layers) - 2) * width
            values, ids = drafter.expand_best(tokens, fed, width)
            weights, place = (values.exp() * weights.unsqueeze(-1)).flatten(1).topk(width, dim=-1)
            layers.append((ids.flatten(1).gather(1, place), weights, place // width))
            known = torch.cat([layer[1] for layer in layers[:-1]], dim=1)
            # Whether to go on is decided on the host, which has to know it anyway.
            total = known.topk(min(self.nodes, known.shape[1]), dim=-1).values.sum(dim=-1).tolist()
            for row, (now, before) in enumerate(zip(total, expected, strict=True)):
                grows = now - before > self.threshold and len(layers) < most
                levels[row] = levels[row] or (0 if grows else len(layers) - 1)
            expected = total
            if all(levels):
                return self.selected(layers, torch.tensor(levels, device=tokens.device), width)

    def selected(
        self, layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], levels: torch.Tensor, width: int
    ) -> DraftTree:
        """The best drafts of the first `levels` (batch,) layers of each row, those of a layer together."""
        depth = len(layers) - 1
        tokens, weights, above = (torch.cat([layer[i] for layer in layers[:-1]], dim=1) for i in range(3))
        layer = torch.arange(depth, device=tokens.device).repeat_interleave(width)
        weights = torch.where(layer < levels[:, None], weights, -1.0)
        kept = weights.topk(min(self.nodes, width * int(levels.min())), dim=-1).indices
        kept = kept.gather(1, (kept // width).argsort(dim=-1))
        parents = above.gather(1, kept) + (kept // width - 1) * width
        is_parent = parents.unsqueeze(-1) == kept.unsqueeze(1)
        place = is_parent.int().argmax(dim=-1)
        parents = torch.where(
            is_parent.any(dim=-1), place, -1
        )  # -1 too where a tie has cost the parent its place
        return DraftTree(tokens.gather(1, kept), depth, parents, branching=width)
