"""Which drafts stay: greedy match, rejection sampling (arXiv 2211.17192, on trees 2305.09781), typical acceptance."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...sampling import acceptance, bernoulli, categorical, one_hot, residual
from ...stored import Part
from ..base import Guarantee
from .draft_tree import DraftContext, DraftTree
from .fused import can_verify, greedy, verified


@dataclass
class Verdict:
    """
    What a step adds to each row.

    Attributes:
        tokens: (batch, depth + 1) int64: the accepted drafts, after them one token of the model, then anything.
        count: how many of them each row gains: its accepted drafts and one.
        nodes: (batch, depth + 1) int64, the nodes before these tokens: the row's end, then the accepted drafts; `None`
            for 0, 1, 2, ... of a chain.
        in_place: whether those that stay are known to be 0, 1, 2, ... in a tree, too.
    """

    tokens: torch.Tensor
    count: list[int]
    nodes: torch.Tensor | None = None
    in_place: bool = False

    def kept_nodes(self) -> torch.Tensor | None:
        """What a predictor has to move together; `None` where the nodes that stay are the first ones."""
        width = max(self.count)
        return None if self.nodes is None or self.in_place or width == 1 else self.nodes[:, :width]

    def along(self, values: torch.Tensor) -> torch.Tensor:
        """(batch, nodes, size) to (batch, depth + 1, size), that from which each token comes."""
        if self.nodes is None:
            return values
        return values.gather(1, self.nodes[:, :, None].expand(-1, -1, values.shape[-1]))


@dataclass
class AcceptanceRule(Part, ABC):
    """
    Base of the rules by which drafts are kept.

    Class attributes:
        guarantee: what they promise for a request that samples; where it does not, all of them keep the drafts that are
            the model's best tokens.
        needs_independent: whether drafts have to be drawn independently.
    """

    kind: ClassVar[str] = "acceptance rule"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT_IN_DISTRIBUTION
    needs_independent: ClassVar[bool] = False

    def verify(self, scores: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        """
        Args:
            scores: (batch, n + 1, vocab_size) float32, the model's, of what follows each node.
            tree: the n drafts.
        """
        if not context.do_sample:
            if can_verify(scores, tree):
                return completed(*verified(greedy(scores), tree, context, is_greedy=True), tree)
            return matching(scores.argmax(dim=-1), tree)
        return self.sample(scores, tree, context)

    @abstractmethod
    def sample(self, scores: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        """The verdict for a request that samples."""


def matching(chosen: torch.Tensor, tree: DraftTree) -> Verdict:
    """Follows the tokens (batch, n + 1) that the model has chosen at every node, as far as there are drafts of them."""
    if not tree.is_chain and chosen.device.type == "cpu":
        return _matching_on_host(chosen, tree)
    passes = chosen.gather(1, tree.parent_nodes()) == tree.tokens
    if tree.is_chain:
        return Verdict(chosen, (passes.long().cumprod(dim=1).sum(dim=1) + 1).tolist())
    length, last = tree.reached(passes).max(dim=1)
    nodes = tree.path(last, length)
    return Verdict(chosen.gather(1, nodes), length.tolist(), nodes)


def _matching_on_host(chosen: torch.Tensor, tree: DraftTree) -> Verdict:
    """The same for a tree whose tokens are at hand: walking it takes less time than one operation on tensors."""
    parents = tree.parents.expand(tree.tokens.shape).tolist()
    width = tree.depth + 1
    paths = []
    for best, drafts, before in zip(chosen.tolist(), tree.tokens.tolist(), parents, strict=True):
        length = [1]  # of the path to each node, if all on it pass
        for token, parent in zip(drafts, before, strict=True):
            above = length[parent + 1]
            length.append(above + 1 if above and best[parent + 1] == token else 0)
        node = length.index(max(length))
        path = []
        while node:
            path.append(node)
            node = before[node - 1] + 1
        paths.append([0, *path[::-1]])
    nodes = torch.tensor([path + [0] * (width - len(path)) for path in paths])
    in_place = all(path == list(range(len(path))) for path in paths)
    return Verdict(chosen.gather(1, nodes), [len(path) for path in paths], nodes, in_place)


def completed(nodes: torch.Tensor, count: torch.Tensor, final: torch.Tensor, tree: DraftTree) -> Verdict:
    """
    Args:
        nodes: (batch, depth + 1) int64, paths of nodes from the row's end on.
        count: (batch,) int64, nodes on each path.
        final: (batch,) int64, the token after it.
    """
    following = torch.nn.functional.pad(nodes[:, 1:], (0, 1))
    tokens = torch.nn.functional.pad(tree.tokens, (1, 0)).gather(1, following)
    place = torch.arange(nodes.shape[1], device=nodes.device)
    tokens = torch.where(place == count[:, None] - 1, final[:, None], tokens)
    return Verdict(tokens, count.tolist(), None if tree.is_chain else nodes)


@dataclass
class ExactMatch(AcceptanceRule):
    """Keeps drafts that are what the model chooses itself: its best tokens, or those that it draws at every node."""

    def sample(self, scores: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        return matching(categorical(scores.softmax(dim=-1), context.generator), tree)


@dataclass
class RejectionSampling(AcceptanceRule):
    """
    Keeps a draft with min(1, p / q), where the drafter drew it from q; after a rejection the next sibling is tried
    against what is left of p, and q without the siblings before it if they were drawn without replacement. Drafts that
    were not drawn count as certain ones, as in EAGLE-2.
    """

    def sample(self, scores: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        probs = scores.softmax(dim=-1)
        if can_verify(probs, tree):
            return completed(*verified(probs, tree, context, is_greedy=False), tree)
        if tree.is_chain:
            return self._chain(probs, tree, context)
        return Walk(probs, tree, context).run(self._level)

    @staticmethod
    def _chain(probs: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        drawn_from = one_hot(tree.tokens, probs) if tree.probs is None else tree.probs
        index = tree.tokens.unsqueeze(-1)
        chance = acceptance(probs[:, :-1].gather(-1, index), drawn_from.gather(-1, index)).squeeze(-1)
        accepted = bernoulli(chance, context.generator)
        first = accepted.long().cumprod(dim=1).sum(dim=1)
        at = first[:, None, None].expand(-1, 1, probs.shape[-1])
        left = torch.cat([residual(probs[:, :-1], drawn_from), probs[:, -1:]], dim=1).gather(1, at)
        final = categorical(left, context.generator)
        nodes = torch.arange(probs.shape[1], device=probs.device).expand(len(probs), -1)
        return completed(nodes, first + 1, final[:, 0], tree)

    @staticmethod
    def _level(walk: "Walk", candidates: torch.Tensor) -> None:
        drawn_from = walk.drawn_from()
        for i in range(candidates.shape[1]):
            node = candidates[:, i]
            tries = walk.tries(node)
            token = walk.token(node)
            own = one_hot(token, walk.probs) if drawn_from is None else drawn_from
            p, q = (one.gather(1, token[:, None])[:, 0] for one in (walk.probs, own))
            tries = tries & (q > 0)
            if walk.nobody(tries):
                continue
            accepted = walk.accept(node, tries, acceptance(p, q))
            rejected = (tries & ~accepted)[:, None]
            walk.probs = torch.where(rejected, residual(walk.probs, own), walk.probs)
            if drawn_from is not None and not walk.tree.with_replacement:
                left = drawn_from.scatter(1, token[:, None], 0.0)
                total = left.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
                drawn_from = torch.where(rejected, left / total, drawn_from)


class Walk:
    """
    The way of all rows down their trees, level by level.

    Attributes:
        probs: (batch, vocab_size), what the next token of each row is to be distributed like, given what was rejected.
    """

    def __init__(self, probs: torch.Tensor, tree: DraftTree, context: DraftContext):
        self.all_probs, self.tree, self.context = probs, tree, context
        self.probs = probs[:, 0]
        self._rows = torch.arange(len(probs), device=probs.device)
        self._tokens = torch.nn.functional.pad(tree.tokens, (1, 0))
        self._node = torch.zeros_like(self._rows)
        self._next = torch.zeros_like(self._rows)  # the node accepted on this level, 0 for none
        self._going = torch.ones_like(self._rows, dtype=torch.bool)

    def run(self, level: Callable[["Walk", torch.Tensor], None]) -> Verdict:
        """Walks by a rule that tries the candidates (batch, c) of one level."""
        trials = self.tree.trials()
        path = [self._node]
        for _ in range(self.tree.depth):
            if self.nobody(self._going):
                break
            self._next = torch.zeros_like(self._node)
            level(self, torch.where(self._going[:, None], trials[self._rows, self._node], 0))
            self._going = self._going & (self._next > 0)
            self._node = torch.where(self._going, self._next, self._node)
            self.probs = torch.where(self._going[:, None], self.all_probs[self._rows, self._node], self.probs)
            path.append(torch.where(self._going, self._next, 0))
        nodes = torch.stack(path, dim=1)
        count = 1 + (nodes[:, 1:] > 0).sum(dim=1)
        return completed(nodes, count, categorical(self.probs, self.context.generator), self.tree)

    def nobody(self, who: torch.Tensor) -> bool:
        """Whether there is certainly no one left; looked up only where that costs nothing."""
        return who.device.type == "cpu" and not bool(who.any())

    def tries(self, node: torch.Tensor) -> torch.Tensor:
        """(batch,) bool: which rows have this candidate (0 for none) and have accepted none before."""
        return self._going & (self._next == 0) & (node > 0)

    def token(self, node: torch.Tensor) -> torch.Tensor:
        return self._tokens[self._rows, node]

    def drawn_from(self) -> torch.Tensor | None:
        """(batch, vocab_size): the distributions from which the candidates of this level were drawn, if they were."""
        if self.tree.probs is None:
            return None
        return self.tree.probs[self._rows, self._node.clamp(max=self.tree.probs.shape[1] - 1)]

    def accept(self, node: torch.Tensor, tries: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        """Lets the rows that try accept their candidate with a chance (batch,); which did."""
        accepted = bernoulli(torch.where(tries, chance, 0.0), self.context.generator)
        self._next = torch.where(accepted, node, self._next)
        return accepted


@dataclass
class TypicalAcceptance(AcceptanceRule):
    """
    Keeps a draft whose probability is above min(`threshold`, `alpha` * exp(-entropy)) of the model's distribution, and
    the longest path of such drafts (Medusa, arXiv 2401.10774). Relaxed: what is kept has more than that probability,
    but is not drawn; the larger `threshold` and `alpha`, the more of it the model would have chosen itself.

    Args:
        threshold: probability that is always enough, in [0, 1].
        alpha: how much of exp(-entropy) is enough.
        greedy_last: whether the token after the accepted drafts is the model's best one, as Medusa's; otherwise it is
            drawn.
    """

    threshold: float = 0.09
    alpha: float = 0.3
    greedy_last: bool = True

    guarantee: ClassVar[Guarantee] = Guarantee.RELAXED

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it is a probability, so it must lie in [0, 1].")
        if self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}; it must be 0 or above.")

    def sample(self, scores: torch.Tensor, tree: DraftTree, context: DraftContext) -> Verdict:
        probs = scores.softmax(dim=-1)
        entropy = -(probs * (probs + 1e-5).log()).sum(dim=-1)
        enough = (self.alpha * (-entropy).exp()).clamp(max=self.threshold)
        before = tree.parent_nodes()
        rows = torch.arange(len(probs), device=probs.device)[:, None]
        likely = probs[rows, before, tree.tokens]
        length = tree.reached(likely > enough.gather(1, before))
        last = self._best(length, likely, tree)
        count = length.gather(1, last[:, None])[:, 0]
        nodes = tree.path(last, count)
        at = probs[rows[:, 0], last]
        final = at.argmax(dim=-1) if self.greedy_last else categorical(at, context.generator)
        return completed(nodes, count, final, tree)

    @staticmethod
    def _best(length: torch.Tensor, likely: torch.Tensor, tree: DraftTree) -> torch.Tensor:
        """(batch,): of the nodes with the longest paths the one whose path is the likeliest."""
        if tree.is_chain:
            return length.argmax(dim=1)
        gain = likely.clamp(min=torch.finfo(likely.dtype).tiny).log()
        before = tree.parent_nodes()
        total = torch.nn.functional.pad(torch.zeros_like(gain), (1, 0))
        for _ in range(tree.depth):
            total[:, 1:] = total.gather(1, before) + gain
        longest = length == length.amax(dim=1, keepdim=True)
        return total.masked_fill(~longest, -torch.inf).argmax(dim=1)
