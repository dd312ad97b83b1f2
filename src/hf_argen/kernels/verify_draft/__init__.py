"""
Which drafts stay: rejection sampling along a chain (arXiv 2211.17192) and over a tree of drafts, child after child
(SpecInfer, arXiv 2305.09781; EAGLE, arXiv 2401.15077), exact in distribution; and the greedy form.
"""

import torch

from .. import checks
from ..dispatch import runs_kernel
from ..library import NAMESPACE, contiguous_rows
from . import reference
from .reference import WRONG_NUMBERS

__all__ = ["check_verified", "verify_draft"]

NAME = "verify_draft"


def verify_draft(
    target: torch.Tensor,
    tokens: torch.Tensor,
    draft: torch.Tensor | None = None,
    uniform: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    parents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    From the committed sequence on, the children of the last accepted node are tried in their order: one passes with
    probability min(1, p / q), and if it does not, what is tried next is held against max(p - q, 0), normalised. After the
    last accepted node a token is drawn from what is left there.

    Args:
        target: (batch, n + 1, vocab) float32, the model's distribution after the sequence, and after each of the n nodes.
        tokens: (batch, n) int64, the drafted token of each node.
        draft: (batch, n, vocab) float32, the distribution that each node was drawn from (of siblings drawn without
            replacement, the one without the earlier ones); `None` for drafts that were not drawn, such as the k best.
        uniform: (batch, n) float32 in [0, 1), which decide; `None` is greedy: a node passes if it is the best token.
        noise: (batch, vocab) float32, draws from the exponential distribution for the race of the last token; with
            `uniform`.
        lengths: (batch,) int64, nodes of each row; the others are not looked at. Default: n.
        parents: (batch, n) int64, the node that each one continues, an earlier one, or -1 for the sequence. Default: a chain.

    Returns:
        path (batch, n) int64, the accepted nodes in their order, then -1; how many there are (batch,) int64; and the token
        (batch,) int64 drawn after them. A length below 0 says that a row is wrong: [`check_verified`] turns it into an
        error once the host has the lengths.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(target, tokens, draft, uniform, noise, lengths, parents)
    if not runs_here(target):
        return reference.verify_draft(target, tokens, draft, uniform, noise, lengths, parents)
    return _operation(target, tokens, draft, uniform, noise, lengths, parents)


def runs_here(target: torch.Tensor) -> bool:
    """Whether a kernel handles distributions (batch, n + 1, vocab), as far as mode, device and size say."""
    rows, places, vocab = target.shape
    return runs_kernel(target, NAME, rows=rows, nodes=places - 1, vocab=vocab)


def check_verified(lengths: list[int]) -> None:
    """
    Args:
        lengths: what [`verify_draft`] returned, on the host.

    Raises:
        ValueError: a row with NaN, or with a tree that is none.
    """
    for row, length in enumerate(lengths):
        if length == WRONG_NUMBERS:
            raise ValueError(
                f"Row {row} has no token to draw, its distribution is NaN or 0 everywhere; check the weights and dtype of the model."
            )
        if length < 0:
            raise ValueError(
                f"The drafts of row {row} are no tree: a parent is no earlier node, or there are more nodes than room for them; "
                "number nodes so that each comes after its parent."
            )


def _check(
    target: torch.Tensor,
    tokens: torch.Tensor,
    draft: torch.Tensor | None,
    uniform: torch.Tensor | None,
    noise: torch.Tensor | None,
    lengths: torch.Tensor | None,
    parents: torch.Tensor | None,
) -> None:
    floats = {"target": target, "draft": draft, "uniform": uniform, "noise": noise}
    integers = {"tokens": tokens, "lengths": lengths, "parents": parents}
    checks.same_device(NAME, **floats, **integers)
    checks.dtypes(NAME, (torch.float32,), **floats)
    checks.dtypes(NAME, (torch.int64,), **integers)
    checks.shape(NAME, "tokens", tokens, None, None)
    batch, n = tokens.shape
    checks.shape(NAME, "target", target, batch, n + 1, None)
    vocab = target.shape[-1]
    if draft is not None and draft.shape[-1] != vocab:
        raise ValueError(
            f"{NAME}: the drafter draws from {draft.shape[-1]} tokens, the model from {vocab}; they must agree."
        )
    checks.shape(NAME, "draft", draft, batch, n, vocab)
    checks.shape(NAME, "uniform", uniform, batch, n)
    checks.shape(NAME, "noise", noise, batch, vocab)
    checks.shape(NAME, "lengths", lengths, batch)
    checks.shape(NAME, "parents", parents, batch, n)
    if (uniform is None) != (noise is None):
        raise ValueError(
            f"{NAME}: uniform and noise come together; give both, or neither to verify greedily."
        )
    if vocab == 0:
        raise ValueError(f"{NAME}: the vocabulary is empty; target must be (batch, n + 1, 1 or more).")


@torch.library.custom_op(f"{NAMESPACE}::verify_draft", mutates_args=())
def _operation(
    target: torch.Tensor,
    tokens: torch.Tensor,
    draft: torch.Tensor | None,
    uniform: torch.Tensor | None,
    noise: torch.Tensor | None,
    lengths: torch.Tensor | None,
    parents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import triton

    outputs = _outputs(target, tokens, draft, uniform, noise, lengths, parents)
    tokens, uniform, noise, lengths, parents = (
        None if one is None else one.contiguous() for one in (tokens, uniform, noise, lengths, parents)
    )
    triton.verify(
        contiguous_rows(target), tokens, contiguous_rows(draft), uniform, noise, lengths, parents, outputs
    )
    return outputs


@_operation.register_fake
def _outputs(
    target: torch.Tensor,
    tokens: torch.Tensor,
    draft: torch.Tensor | None,
    uniform: torch.Tensor | None,
    noise: torch.Tensor | None,
    lengths: torch.Tensor | None,
    parents: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = tokens.shape[0]
    return tokens.new_empty(tokens.shape), tokens.new_empty((batch,)), tokens.new_empty((batch,))
