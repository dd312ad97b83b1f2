"""Verification in one pass of the kernel `verify_draft`, which draws what the rules draw, from the same noise."""

import torch
import torch.nn.functional as F

from ....kernels.verify_draft import runs_here, verify_draft
from ...sampling import exponential, is_torch, one_hot, rand
from .draft_tree import DraftContext, DraftTree


def can_verify(probs: torch.Tensor, tree: DraftTree) -> bool:
    """
    Whether the kernel runs, and tries drafts in the order in which the rules do: the children of a node, one after another.

    Args:
        probs: (batch, n + 1, vocab_size), or scores.
    """
    return tree.size > 0 and tree.candidates is None and is_torch() and runs_here(probs)


def verified(
    probs: torch.Tensor, tree: DraftTree, context: DraftContext, is_greedy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        probs: (batch, n + 1, vocab_size) float32, the model's distributions.
        is_greedy: whether they are all on one token, which drafts have to be.

    Returns:
        nodes (batch, depth + 1) int64, the row's end and the accepted drafts, then 0; how many these are (batch,); and the
        token (batch,) after them. Rows with NaN accept nothing here; `generate` says why at its end.
    """
    draft, uniform, noise = None, None, None
    if not is_greedy:
        if tree.is_chain:
            draft, uniform = tree.probs, rand(tree.tokens.shape, context.generator, probs.device)
        else:
            draft, uniform = _by_level(tree, context)
        noise = exponential(probs[:, 0], context.generator)
    parents = None if tree.is_chain else tree.parent_nodes() - 1
    path, count, token = verify_draft(probs, tree.tokens, draft, uniform, noise, None, parents)
    nodes = F.pad(path + 1, (1, 0))[:, : tree.depth + 1]
    return nodes, count.clamp(min=0) + 1, token


def greedy(scores: torch.Tensor) -> torch.Tensor:
    """Distributions on the best tokens of scores (..., vocab_size); a softmax could make two of them equal."""
    return one_hot(scores.argmax(dim=-1), scores)


def _by_level(tree: DraftTree, context: DraftContext) -> tuple[torch.Tensor | None, torch.Tensor]:
    """
    What the nodes of a tree were drawn from (batch, n, vocab_size), if they were, and the numbers (batch, n) that decide.

    The numbers are drawn level by level and child by child, as a walk down the tree draws them.
    """
    trials, before = tree.trials(), tree.parent_nodes()
    batch = len(before)
    draws = [rand((batch,), context.generator, before.device) for _ in range(tree.depth * trials.shape[2])]
    level = torch.zeros_like(before)
    for _ in range(1, tree.depth):
        above = F.pad(level, (1, 0), value=-1).gather(1, before)
        level = above + 1
    rank = (before[:, :, None] == before[:, None, :]).long().tril(-1).sum(dim=-1)
    place = level * trials.shape[2] + rank.clamp(max=trials.shape[2] - 1)
    uniform = torch.stack(draws, dim=1).gather(1, place)
    uniform = torch.where(rank < trials.shape[2], uniform, 1.0)  # 1 never passes
    if tree.probs is None:
        return None, uniform
    draft = _drawn_from(tree, trials)
    chance = draft.gather(-1, tree.tokens.unsqueeze(-1)).squeeze(-1)
    # What could not be drawn is not tried: it does not pass, and takes nothing off what is left.
    uniform = torch.where(chance > 0, uniform, 1.0)
    return draft * (chance > 0).unsqueeze(-1), uniform


def _drawn_from(tree: DraftTree, trials: torch.Tensor) -> torch.Tensor:
    """(batch, n, vocab_size): of siblings drawn without replacement, the distribution without the earlier ones."""
    batch, n = tree.tokens.shape
    most, vocab = tree.probs.shape[1:]
    left = tree.probs
    if tree.with_replacement:
        index = tree.parent_nodes().clamp(max=most - 1).unsqueeze(-1)
        return left.gather(1, index.expand(-1, -1, vocab))
    tokens = F.pad(tree.tokens, (1, 0))
    draft = left.new_zeros(batch, n + 1, vocab)
    for nodes in trials[:, :most].unbind(2):  # the first children of all nodes, then the second, ...
        draft = draft.scatter(1, nodes.unsqueeze(-1).expand(-1, -1, vocab), left)
        token = tokens.gather(1, nodes).unsqueeze(-1)
        rest = left.scatter(-1, token, 0.0)
        rest = rest / rest.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
        was_tried = (nodes > 0).unsqueeze(-1) & (left.gather(-1, token) > 0)
        left = torch.where(was_tried, rest, left)
    return draft[:, 1:]
