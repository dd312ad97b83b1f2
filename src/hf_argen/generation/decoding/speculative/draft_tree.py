"""Drafts of one step: a tree of tokens that may follow each row."""

from dataclasses import dataclass
from typing import Protocol

import torch

from ...sampling import Generators
from ...transcript import Transcript


@dataclass
class DraftContext:
    """What the drafting of a request depends on beside the drafter."""

    transcript: Transcript
    do_sample: bool
    generator: Generators = None


class Nodes(Protocol):
    """Who predicts what follows drafts: a drafter at work on one request."""

    def root(self) -> torch.Tensor:
        """(batch, vocab_size) float32 logits of what follows each row. Called once a step, before `expand`."""
        ...

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            tokens: (batch, n) int64, drafts.
            parents: (batch, n) int64, which of all drafts given to this method since `root` each one continues, -1 for
                the row; `None`: each the one before it.

        Returns:
            (batch, n, vocab_size) float32 logits of what follows each of them.
        """
        ...

    def root_best(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of `root`: log-probabilities (batch, k) and ids of the k likeliest tokens, fewer of fewer tokens."""
        return likeliest(self.root(), k)

    def expand_best(
        self, tokens: torch.Tensor, parents: torch.Tensor | None, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of `expand`: log-probabilities (batch, n, k) and ids of the k likeliest tokens after each draft."""
        return likeliest(self.expand(tokens, parents), k)

    def ready(self, length: int) -> "DraftTree | None":
        """A chain of at most `length` drafts that needs no distributions; `None` from most drafters."""
        return None


def likeliest(
    logits: torch.Tensor, k: int, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and ids (..., k) of the likeliest tokens by logits (..., size), which are of `ids` (size,) if given."""
    values, place = logits.log_softmax(dim=-1).topk(min(k, logits.shape[-1]), dim=-1)
    return values, place if ids is None else ids[place]


@dataclass
class DraftTree:
    """
    Tokens that may follow each row. Node 0 is the end of the row, node i + 1 its i-th draft; a draft comes after the one
    that it continues.

    Attributes:
        tokens: (batch, n) int64.
        depth: the longest path.
        parents: (batch or 1, n) int64, the draft that each one continues, -1 for the row; `None` for a chain.
        probs: (batch, m, vocab_size) float32, the distributions from which the children of the first m nodes were
            drawn; `None` if nothing was drawn.
        with_replacement: whether siblings were drawn independently of each other, or each from what was left.
        candidates: (batch or 1, n + 1, c) int64, the nodes that may follow each node in the order of trial, 0 for none;
            a node may come twice. Default: the children in their order, at most `branching` of them.
        branching: the most children of a node.
    """

    tokens: torch.Tensor
    depth: int
    parents: torch.Tensor | None = None
    probs: torch.Tensor | None = None
    with_replacement: bool = True
    candidates: torch.Tensor | None = None
    branching: int = 1

    @classmethod
    def none(cls, like: torch.Tensor) -> "DraftTree":
        """No drafts; `like` (batch, ...) tells how many rows there are."""
        return cls(like.new_zeros(len(like), 0, dtype=torch.long), 0)

    @property
    def size(self) -> int:
        """Drafts of each row."""
        return self.tokens.shape[1]

    @property
    def is_chain(self) -> bool:
        return self.parents is None

    def parent_nodes(self) -> torch.Tensor:
        """(batch, n) int64: the node before each draft."""
        if self.parents is None:
            return torch.arange(self.size, device=self.tokens.device).expand(self.tokens.shape)
        return (self.parents + 1).expand(self.tokens.shape)

    def fed_parents(self) -> torch.Tensor | None:
        """(batch, n + 1) int64, what a predictor takes that is fed the last token of the row and then the drafts."""
        if self.parents is None:
            return None
        before = self.parent_nodes()
        return torch.cat([before.new_full((len(before), 1), -1), before], dim=1)

    def trials(self) -> torch.Tensor:
        """(batch, n + 1, c) int64: `candidates`."""
        batch, device = len(self.tokens), self.tokens.device
        if self.candidates is not None:
            return self.candidates.expand(batch, -1, -1)
        before = self.parent_nodes()
        same = before[:, :, None] == before[:, None, :]
        rank = same.long().tril(-1).sum(dim=-1)
        width = self.branching + 1  # the last place is for children beyond the bound, which are not tried
        table = torch.zeros(batch, (self.size + 1) * width, dtype=torch.long, device=device)
        nodes = torch.arange(1, self.size + 1, device=device).expand(batch, -1)
        table.scatter_(1, before * width + rank.clamp(max=self.branching), nodes)
        return table.view(batch, self.size + 1, width)[..., :-1]

    def reached(self, passes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            passes: (batch, n) bool, whether each draft is good after the one before it.

        Returns:
            (batch, n + 1) int64: nodes from the row's end to each one if all on its path pass, itself included; else 0.
        """
        length = torch.ones(len(passes), self.size + 1, dtype=torch.long, device=passes.device)
        length[:, 1:] = 0
        before, good = self.parent_nodes(), passes.long()
        for _ in range(self.depth):
            parent = length.gather(1, before)
            length[:, 1:] = (parent + (parent > 0)) * good
        return length

    def path(self, last: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """(batch, depth + 1) int64: the nodes from the row's end to `last` (batch,), `count` (batch,) in all, then 0."""
        before = torch.cat([torch.zeros_like(last)[:, None], self.parent_nodes()], dim=1)
        place = torch.arange(self.depth + 1, device=last.device)
        nodes = torch.zeros(len(last), self.depth + 1, dtype=torch.long, device=last.device)
        for back in range(self.depth + 1):
            at = (count - 1 - back)[:, None]
            nodes = torch.where(place == at, last[:, None], nodes)
            last = before.gather(1, last[:, None])[:, 0]
        return nodes
