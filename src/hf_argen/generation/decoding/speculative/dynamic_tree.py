"""Trees that follow the drafter's confidence (EAGLE-2, arXiv 2406.16858)."""

from dataclasses import dataclass

import torch

from .draft_tree import DraftContext, DraftTree, Nodes
from .trees import Tree, check_positive


@dataclass
class DynamicTree(Tree):
    """
    On every level the `top_k` likeliest drafts are continued by their `top_k` likeliest tokens; of all these the likeliest
    by the product of probabilities on their path are verified.

    Args:
        total_token: nodes that the model verifies, the last token of the row included.
        depth: levels after the first.
        top_k: drafts that are continued on each level.
    """

    total_token: int = 60
    depth: int = 7
    top_k: int = 10

    def __post_init__(self) -> None:
        check_positive(self, "top_k")
        if self.total_token < 2:
            raise ValueError(
                f"total_token of DynamicTree is {self.total_token}; it counts the last token of the row, so it must be at "
                "least 2."
            )
        if self.depth < 0:
            raise ValueError(
                f"depth of DynamicTree is {self.depth}; it must be at least 0, which is one level."
            )

    @property
    def most_drafts(self) -> int:
        return self.total_token - 1

    @property
    def most_expanded(self) -> int:
        return self.depth * self.top_k

    @property
    def most_depth(self) -> int:
        return self.depth + 1

    def grow(self, drafter: Nodes, context: DraftContext, depth: int) -> DraftTree:
        # All scored drafts, in order: k of the first level, then k * k of each; and the number of each one's parent.
        beam_scores, beam_tokens = drafter.root_best(self.top_k)
        k = beam_tokens.shape[1]
        beams = torch.arange(k, device=beam_tokens.device).expand(beam_tokens.shape)
        tokens, totals, parents = [beam_tokens], [beam_scores], [torch.full_like(beam_tokens, -1)]
        came_from = torch.full_like(
            beam_tokens, -1
        )  # the parents of the beams among all drafts that were continued
        for level in range(min(self.depth, depth - 1)):
            values, ids = drafter.expand_best(beam_tokens, came_from, k)
            scores = (values + beam_scores.unsqueeze(-1)).flatten(1)
            tokens.append(ids.flatten(1))
            totals.append(scores)
            parents.append(beams.unsqueeze(-1).expand(-1, -1, k).flatten(1))
            beam_scores, place = scores.topk(k, dim=-1)
            beam_tokens = tokens[-1].gather(1, place)
            beams = k + level * k * k + place
            came_from = level * k + place // k
        return self.selected(torch.cat(tokens, 1), torch.cat(totals, 1), torch.cat(parents, 1), k, depth)

    def selected(
        self, tokens: torch.Tensor, scores: torch.Tensor, parents: torch.Tensor, k: int, depth: int
    ) -> DraftTree:
        """The best of all drafts (batch, m) by their scores, in the order of m; a parent scores above its children."""
        kept = scores.topk(min(self.most_drafts, scores.shape[1]), dim=-1).indices.sort(dim=-1).values
        above = parents.gather(1, kept)
        place = torch.searchsorted(kept, above)
        is_kept = (
            kept.gather(1, place.clamp(max=kept.shape[1] - 1)) == above
        )  # a tie may have cost it its place
        return DraftTree(
            tokens.gather(1, kept),
            min(self.most_depth, depth),
            torch.where(is_kept, place, -1),
            branching=k,
        )
