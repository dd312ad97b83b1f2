"""
Rejection sampling over a tree of drafts: one program walks down the tree of its row.

A node comes after its parent, so one pass over the nodes in their order meets the children of every node that is
accepted. Only where a draft is rejected, or something is drawn, is a distribution read as a whole.
"""

import torch
import triton
import triton.language as tl

from ..library import on_its_device
from ..variants import OPTIONS, Variant

TILE = 4096  # tokens that are read at once, at most
TINY = torch.finfo(torch.float32).tiny


@triton.jit
def _left(target, scratch, is_changed, factor, token, vocab):
    """What is left of a distribution: itself, or times a factor what earlier rejections have left of it."""
    whole = tl.load(target + token, mask=token < vocab * (1 - is_changed), other=0.0)
    rest = tl.load(scratch + token, mask=token < vocab * is_changed, other=0.0)
    return whole + rest * factor


@triton.jit
def _best(target, vocab, BLOCK: tl.constexpr):
    """The most probable token, of several the first."""
    best = tl.full([], float("-inf"), tl.float32)
    chosen = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        probs = tl.load(target + token, mask=token < vocab, other=float("-inf"))
        highest, place = tl.max(probs, axis=0, return_indices=True)
        if highest > best:
            best = highest
            chosen = start + place
    return chosen


@triton.jit
def verify_kernel(
    target, tokens, draft, uniform, noise, lengths, parents, scratch, path, counts, drawn,
    n, vocab, target_row, target_place, draft_row, draft_place, tiny,
    GREEDY: tl.constexpr, HAS_DRAFT: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_PARENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tokens += row * n
    path += row * n
    noise += row * vocab
    scratch += row * vocab
    target += row * target_row
    if HAS_DRAFT:
        draft += row * draft_row
    if not GREEDY:
        uniform += row * n
    if HAS_PARENTS:
        parents += row * n
    length = n
    is_tree = 1
    if HAS_LENGTHS:
        length = tl.load(lengths + row).to(tl.int32)
        if (length < 0) | (length > n):
            is_tree = 0
            length = 0
    state = -1
    count = 0
    is_changed = 0
    factor = tl.full([], 1.0, tl.float32)
    best = tl.full([], 0, tl.int32)
    if GREEDY:
        best = _best(target, vocab, BLOCK)
    for node in range(length):
        parent = node - 1
        if HAS_PARENTS:
            parent = tl.load(parents + node).to(tl.int32)
            if (parent >= node) | (parent < -1):
                is_tree = 0
        if parent == state:
            token = tl.load(tokens + node).to(tl.int32)
            if GREEDY:
                passes = token == best
            else:
                chance = _left(target, scratch, is_changed, factor, token, vocab)
                if HAS_DRAFT:
                    chance /= tl.maximum(tl.load(draft + node * draft_place + token), tiny)
                passes = tl.load(uniform + node) < tl.minimum(chance, 1.0)
            if passes:
                tl.store(path + count, node)
                count += 1
                target += (node - state) * target_place
                state = node
                is_changed = 0
                factor = tl.full([], 1.0, tl.float32)
                if GREEDY:
                    best = _best(target, vocab, BLOCK)
            elif not GREEDY:
                totals = tl.zeros([BLOCK], tl.float32)
                for start in range(0, vocab, BLOCK):
                    place = start + tl.arange(0, BLOCK)
                    inside = place < vocab
                    rest = _left(target, scratch, is_changed, factor, place, vocab)
                    if HAS_DRAFT:
                        rest -= tl.load(draft + node * draft_place + place, mask=inside, other=0.0)
                        rest = tl.where(rest < 0.0, 0.0, rest)  # NaN stays
                    else:
                        rest = tl.where(place == token, 0.0, rest)
                    totals += rest
                    tl.store(scratch + place, rest, mask=inside)
                total = tl.sum(totals, axis=0)
                tl.debug_barrier()  # other threads may read what one wrote
                is_changed = (total > 0.0).to(tl.int32)
                factor = 1.0 / tl.maximum(total, tiny)
    masses = tl.zeros([BLOCK], tl.float32)
    farthest = tl.full([], -1.0, tl.float32)
    chosen = tl.full([], 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocab
        left = _left(target, scratch, is_changed, factor, place, vocab)
        masses += left
        if not GREEDY:
            left = left / tl.load(noise + place, mask=inside, other=1.0)
        reached, winner = tl.max(tl.where(inside, left, -1.0), axis=0, return_indices=True)
        if reached > farthest:
            farthest = reached
            chosen = start + winner
    mass = tl.sum(masses, axis=0)
    is_sound = (mass > 0.0) & (mass < float("inf"))
    is_fine = is_sound & (is_tree == 1)
    for node in range(n):
        if (node >= count) | (is_fine == 0):
            tl.store(path + node, -1)
    failed = tl.where(is_tree == 1, -1, -2)
    tl.store(counts + row, tl.where(is_fine, count, failed).to(tl.int64))
    tl.store(drawn + row, tl.where(is_fine, chosen, 0).to(tl.int64))


def block_of(vocab: int) -> int:
    """Tokens that are read at once; never 2048, for which compilers spill registers."""
    block = min(triton.next_power_of_2(vocab), TILE)
    return 1024 if block == 2048 else block


def num_warps(block: int) -> int:
    """Four tokens for each thread, and 16 of the largest block."""
    return min(max(block // 128, 1), 8)


@on_its_device
def verify(
    target: torch.Tensor,
    tokens: torch.Tensor,
    draft: torch.Tensor | None,
    uniform: torch.Tensor | None,
    noise: torch.Tensor | None,
    lengths: torch.Tensor | None,
    parents: torch.Tensor | None,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fills `outputs`: path, length of it, and the token drawn after it."""
    batch, n = tokens.shape
    vocab = target.shape[-1]
    if batch == 0:
        return
    scratch = (
        target if noise is None else noise.new_empty(noise.shape)
    )  # greedily, nothing is left of anything
    block = block_of(vocab)
    verify_kernel[(batch,)](
        target, tokens, draft, uniform, scratch if noise is None else noise, lengths, parents, scratch, *outputs,
        n, vocab, *target.stride()[:2], *((0, 0) if draft is None else draft.stride()[:2]), TINY,
        GREEDY=noise is None, HAS_DRAFT=draft is not None, HAS_LENGTHS=lengths is not None,
        HAS_PARENTS=parents is not None, BLOCK=block, num_warps=num_warps(block), **OPTIONS,
    )  # fmt: skip


def variants() -> list[Variant]:
    """A chain with the drafter's distributions, a tree of fixed drafts (EAGLE), and the greedy form of it."""
    floats = ["target", "draft", "uniform", "noise", "scratch"]
    types = {
        **dict.fromkeys(floats, "*fp32"),
        **dict.fromkeys(["tokens", "lengths", "parents", "path", "counts", "drawn"], "*i64"),
        **dict.fromkeys(["n", "vocab", "target_row", "target_place", "draft_row", "draft_place"], "i32"),
        "tiny": "fp32",
    }  # fmt: skip
    forms = {
        "chain": {"GREEDY": False, "HAS_DRAFT": True, "HAS_LENGTHS": True, "HAS_PARENTS": False},
        "tree": {"GREEDY": False, "HAS_DRAFT": False, "HAS_LENGTHS": True, "HAS_PARENTS": True},
        "tree, greedy": {"GREEDY": True, "HAS_DRAFT": False, "HAS_LENGTHS": True, "HAS_PARENTS": True},
    }
    return [
        Variant(label, verify_kernel, types, {**form, "BLOCK": TILE}, num_warps(TILE))
        for label, form in forms.items()
    ]
