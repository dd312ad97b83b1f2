"""
Guidance, truncation and one draw from each row of logits, without a sort.

What top-k, top-p and min-p keep are the scores above some bound. Number and mass of the scores above a bound fall with
it, so it is found by bisection over the bits of a float, of which there are 32, and most often in far fewer steps: they
end as soon as one score at most lies between the bounds. Rows of up to `LARGEST_ROW` scores stay in registers.
"""

import torch
import triton
import triton.language as tl

from ..library import on_its_device
from ..variants import OPTIONS, Variant

LARGEST_ROW = 8192  # that stays in registers
TILE = 4096  # of longer rows
NOTHING, PROBABILITIES, SCORES = 0, 1, 2  # what is written beside tokens


@triton.jit
def _key(score):
    """Integers in the order of the floats."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(
    logits, unconditional, start, vocab, guidance, temperature, GUIDED: tl.constexpr, BLOCK: tl.constexpr
):
    token = start + tl.arange(0, BLOCK)
    inside = token < vocab
    score = tl.load(logits + token, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        other = tl.load(unconditional + token, mask=inside, other=0.0).to(tl.float32)
        score = other + (1.0 + guidance) * (score - other)
    score = tl.math.div_rn(score, temperature)
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals 0 but has another key
    return tl.where(inside, score, float("-inf"))


@triton.jit
def _above(row, scratch, vocab, bound, best, IN_REGISTERS: tl.constexpr, BLOCK: tl.constexpr):
    """How many scores have a key of at least `bound`, and the sum of exp(score - best) over them."""
    if IN_REGISTERS:
        kept = _key(row) >= bound
        count = tl.sum(kept.to(tl.int32), axis=0)
        mass = tl.sum(tl.where(kept, tl.exp(row - best), 0.0), axis=0)
    else:
        counts = tl.zeros([BLOCK], tl.int32)
        masses = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            tile = tl.load(scratch + token, mask=token < vocab, other=float("-inf"))
            kept = _key(tile) >= bound
            counts += kept.to(tl.int32)
            masses += tl.where(kept, tl.exp(tile - best), 0.0)
        count = tl.sum(counts, axis=0)
        mass = tl.sum(masses, axis=0)
    return count, mass


@triton.jit
def _raced(score, noise, start, vocab, HAS_NOISE: tl.constexpr, best, kept, BLOCK: tl.constexpr):
    """The winner of a block: how far it came, its place, and its score."""
    token = start + tl.arange(0, BLOCK)
    if HAS_NOISE:
        luck = tl.load(noise + token, mask=token < vocab, other=1.0).to(tl.float32)
        race = tl.where(kept, tl.exp(score - best) / luck, -1.0)
    else:
        race = tl.where(kept, score, float("-inf"))
    reached, place = tl.max(race, axis=0, return_indices=True)
    own = tl.max(tl.where(tl.arange(0, BLOCK) == place, score, float("-inf")), axis=0)
    return reached, start + place, own


@triton.jit
def _written(score, kept, best, mass, is_sound, is_empty, WRITE: tl.constexpr):
    if WRITE == 1:
        return tl.where(is_sound, tl.where(kept, tl.exp(score - best) / mass, 0.0), float("nan"))
    return tl.where(is_sound | is_empty, tl.where(kept, score, float("-inf")), float("nan"))


@triton.jit
def sample_kernel(
    logits, unconditional, noise, parameters, scratch, tokens, log_probs, written,
    vocab, logits_row, unconditional_row, noise_row, guidance, temperature, top_k, top_p, min_p,
    GUIDED: tl.constexpr, HAS_NOISE: tl.constexpr, PER_ROW: tl.constexpr, WRITE: tl.constexpr,
    IN_REGISTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    logits += index * logits_row
    if GUIDED:
        unconditional += index * unconditional_row
    if HAS_NOISE:
        noise += index * noise_row
    if PER_ROW:
        parameters += index * 5
        guidance = tl.load(parameters)
        temperature = tl.load(parameters + 1)
        top_k = tl.load(parameters + 2).to(tl.int32)
        top_p = tl.load(parameters + 3)
        min_p = tl.load(parameters + 4)
    if not IN_REGISTERS:
        scratch += index * vocab

    # Scores, the best of them, and how many are NaN
    if IN_REGISTERS:
        row = _scores(logits, unconditional, 0, vocab, guidance, temperature, GUIDED, BLOCK)
        best = tl.max(row, axis=0)
        wrong = tl.sum((row != row).to(tl.int32), axis=0)
    else:
        row = 0.0
        tops = tl.full([BLOCK], float("-inf"), tl.float32)
        wrongs = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab, BLOCK):
            tile = _scores(logits, unconditional, start, vocab, guidance, temperature, GUIDED, BLOCK)
            token = start + tl.arange(0, BLOCK)
            tl.store(scratch + token, tile, mask=token < vocab)
            tops = tl.maximum(tops, tile)
            wrongs += (tile != tile).to(tl.int32)
        best = tl.max(tops, axis=0)
        wrong = tl.sum(wrongs, axis=0)
        tl.debug_barrier()  # other threads may read what one wrote
    is_good = (wrong == 0) & (temperature > 0.0) & (best < float("inf"))
    is_sound = is_good & (best > float("-inf"))
    is_empty = is_good & (best == float("-inf"))

    # top-k: the largest bound above which at least k scores lie
    bound = tl.full([], -2147483648, tl.int32)
    ceiling = _key(best) + 1  # above it lies nothing
    if is_sound & (top_k > 0) & (top_k < vocab):
        outside = ceiling
        while bound + 1 < outside:
            middle = (bound & outside) + ((bound ^ outside) >> 1)
            count, _mass = _above(row, scratch, vocab, middle, best, IN_REGISTERS, BLOCK)
            if count >= top_k:
                bound = middle
                if count == top_k:
                    outside = middle + 1
            else:
                outside = middle

    # top-p: the largest bound above which enough of what is left lies
    if is_sound & (top_p < 1.0):
        inner, all_mass = _above(row, scratch, vocab, bound, best, IN_REGISTERS, BLOCK)
        enough = top_p * all_mass
        outside = ceiling
        outer = tl.full([], 0, tl.int32)
        while (bound + 1 < outside) & (inner > outer + 1):
            middle = (bound & outside) + ((bound ^ outside) >> 1)
            count, mass = _above(row, scratch, vocab, middle, best, IN_REGISTERS, BLOCK)
            if mass >= enough:
                bound = middle
                inner = count
            else:
                outside = middle
                outer = count
    nearest = tl.log(min_p)  # -inf for 0: then no score is too far

    # The draw
    if IN_REGISTERS:
        kept = (_key(row) >= bound) & (row - best >= nearest)
        mass = tl.sum(tl.where(kept, tl.exp(row - best), 0.0), axis=0)
        _reached, chosen, own = _raced(row, noise, 0, vocab, HAS_NOISE, best, kept, BLOCK)
        if WRITE != 0:
            token = tl.arange(0, BLOCK)
            result = _written(row, kept, best, mass, is_sound, is_empty, WRITE)
            tl.store(written + index * vocab + token, result, mask=token < vocab)
    else:
        masses = tl.zeros([BLOCK], tl.float32)
        farthest = tl.full([], float("-inf"), tl.float32)
        chosen = tl.full([], 0, tl.int32)
        own = tl.full([], 0.0, tl.float32)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            tile = tl.load(scratch + token, mask=token < vocab, other=float("-inf"))
            kept = (_key(tile) >= bound) & (tile - best >= nearest)
            masses += tl.where(kept, tl.exp(tile - best), 0.0)
            reached, place, score = _raced(tile, noise, start, vocab, HAS_NOISE, best, kept, BLOCK)
            if reached > farthest:
                farthest = reached
                chosen = place
                own = score
        mass = tl.sum(masses, axis=0)
        if WRITE != 0:
            for start in range(0, vocab, BLOCK):
                token = start + tl.arange(0, BLOCK)
                tile = tl.load(scratch + token, mask=token < vocab, other=float("-inf"))
                kept = (_key(tile) >= bound) & (tile - best >= nearest)
                result = _written(tile, kept, best, mass, is_sound, is_empty, WRITE)
                tl.store(written + index * vocab + token, result, mask=token < vocab)
    failed = tl.where(is_empty, float("-inf"), float("nan"))
    tl.store(tokens + index, tl.where(is_sound, chosen, 0).to(tl.int64))
    tl.store(log_probs + index, tl.where(is_sound, own - best - tl.log(mass), failed))


def block_of(vocab: int) -> int:
    """Scores that are handled at once."""
    return triton.next_power_of_2(vocab) if vocab <= LARGEST_ROW else TILE


def num_warps(block: int) -> int:
    """16 scores for each thread."""
    return min(max(block // 512, 1), 16)


@on_its_device
def sample(
    logits: torch.Tensor,
    noise: torch.Tensor | None,
    unconditional: torch.Tensor | None,
    parameters: torch.Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    write: int,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fills `outputs`: tokens, log probabilities and, as `write` says, probabilities or scores."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    in_registers = vocab <= LARGEST_ROW
    block = block_of(vocab)
    scratch = None if in_registers else logits.new_empty(rows, vocab, dtype=torch.float32)
    sample_kernel[(rows,)](
        logits, unconditional, noise, parameters, scratch, *outputs, vocab,
        *(0 if one is None else one.stride(0) for one in (logits, unconditional, noise)),
        guidance, temperature, top_k, top_p, min_p,
        GUIDED=unconditional is not None, HAS_NOISE=noise is not None, PER_ROW=parameters is not None, WRITE=write,
        IN_REGISTERS=in_registers, BLOCK=block, num_warps=num_warps(block), **OPTIONS,
    )  # fmt: skip


def variants() -> list[Variant]:
    """A vocabulary of VAR (probabilities kept), of LlamaGen (guided), and of language models (scores kept)."""
    types = {
        "logits": "*fp32", "unconditional": "*fp32", "noise": "*fp32", "scratch": "*fp32", "tokens": "*i64",
        "log_probs": "*fp32", "written": "*fp32", "parameters": "*fp32", "vocab": "i32", "logits_row": "i32",
        "unconditional_row": "i32", "noise_row": "i32", "guidance": "fp32", "temperature": "fp32", "top_k": "i32",
        "top_p": "fp32", "min_p": "fp32",
    }  # fmt: skip
    forms = [
        ("4096 codes, probabilities", 4096, True, False, PROBABILITIES, True),
        ("8192 codes, guided", LARGEST_ROW, True, True, NOTHING, False),
        ("16384 codes, guided", 16_384, True, True, NOTHING, False),
        ("262144 codes, scores", 262_144, False, False, SCORES, False),
    ]
    return [
        Variant(
            label, sample_kernel, types,
            {"GUIDED": guided, "HAS_NOISE": has_noise, "PER_ROW": per_row, "WRITE": write,
             "IN_REGISTERS": vocab <= LARGEST_ROW, "BLOCK": block_of(vocab)},
            num_warps(block_of(vocab)),
        )
        for label, vocab, has_noise, guided, write, per_row in forms
    ]  # fmt: skip
