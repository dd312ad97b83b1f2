"""
From logits to tokens: classifier-free guidance, temperature, top-k, top-p, min-p, and the draw.

The draw is an exponential race: token i arrives after noise_i / p_i, and the first one wins (what `torch.multinomial`
does for one sample). The noise is an input, so that all implementations draw the same token.
"""

import torch

from .. import checks
from ..dispatch import runs_kernel
from ..library import NAMESPACE, contiguous_rows
from . import reference
from .reference import Value

__all__ = ["check_sampled", "filter_logits", "sample_logits"]

NAME = "sample_logits"
NOTHING, PROBABILITIES, SCORES = 0, 1, 2  # what the operation writes beside tokens


def sample_logits(
    logits: torch.Tensor,
    noise: torch.Tensor | None,
    unconditional: torch.Tensor | None = None,
    guidance: Value = 0.0,
    temperature: Value = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: Value = 1.0,
    min_p: Value = 0.0,
    return_probs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    One token from each row. All options are one value, or a tensor (rows,) on the device of the logits.

    Args:
        logits: (rows, vocab) float32, bfloat16 or float16; computed in float32.
        noise: (rows, vocab) float32, draws from the exponential distribution; `None` takes the best token.
        unconditional: like `logits`, the other half of a guided pair:
            unconditional + (1 + guidance) * (logits - unconditional).
        guidance: strength; 0 leaves the logits as they are.
        temperature: divides the logits; above 0.
        top_k: keeps this many of the largest logits, and those equal to the last of them; 0 keeps all.
        top_p: keeps the most probable tokens that together reach this share, and those equal to the last of them; 1 keeps all.
        min_p: keeps tokens at least this many times as probable as the best one; 0 keeps all.
        return_probs: also return the distribution that is drawn from.

    Returns:
        tokens (rows,) int64; their log probabilities (rows,) float32 among what is kept; the distribution (rows, vocab)
        float32, or `None`. Where no draw is possible, the token is 0 and the log probability says why: -inf if no token is
        allowed (all logits are -inf), NaN for logits that are NaN or infinite and for a temperature of 0 or below.
        [`check_sampled`] turns that into an error at the next time that the host waits for the device anyway.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an option that is one value and out of its range.
    """
    _check(logits, noise, unconditional, guidance, temperature, top_k, top_p, min_p)
    if not runs_here(logits):
        return reference.sample_logits(
            logits, noise, unconditional, guidance, temperature, top_k, top_p, min_p, return_probs
        )
    parameters, *values = _packed(logits, guidance, temperature, top_k, top_p, min_p)
    write = PROBABILITIES if return_probs else NOTHING
    tokens, log_probs, probs = _operation(logits, noise, unconditional, parameters, *values, write)
    return tokens, log_probs, probs if return_probs else None


def filter_logits(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None = None,
    guidance: Value = 0.0,
    temperature: Value = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: Value = 1.0,
    min_p: Value = 0.0,
) -> torch.Tensor:
    """
    The scores (rows, vocab) float32 that [`sample_logits`] draws from, -inf for tokens that are not kept; all NaN in rows
    with a NaN. What the temperature, top-k, top-p and min-p warpers of transformers do one after another, but for tokens
    that are exactly equal at the bound, which stay together here.
    """
    _check(logits, None, unconditional, guidance, temperature, top_k, top_p, min_p)
    if not runs_here(logits):
        return reference.filter_logits(logits, unconditional, guidance, temperature, top_k, top_p, min_p)
    parameters, *values = _packed(logits, guidance, temperature, top_k, top_p, min_p)
    return _operation(logits, None, unconditional, parameters, *values, SCORES)[2]


def runs_here(logits: torch.Tensor) -> bool:
    """Whether a kernel handles logits (..., vocab), as far as mode, device and size say."""
    return runs_kernel(logits, NAME, rows=logits.shape[:-1].numel(), vocab=logits.shape[-1])


def check_sampled(log_probs: torch.Tensor) -> None:
    """
    Waits for the device.

    Raises:
        ValueError: [`sample_logits`] could not draw from a row; says which and why.
    """
    for row, value in enumerate(log_probs.flatten().tolist()):
        if value != value:
            raise ValueError(
                f"Row {row} has logits that are NaN or infinite, or a temperature of 0 or below; check the weights and dtype of "
                "the model and the temperature of this row."
            )
        if value == -torch.inf:
            raise ValueError(
                f"Row {row} allows no token, all its logits are -inf; remove a logits processor that forbids all."
            )


def _check(
    logits: torch.Tensor,
    noise: torch.Tensor | None,
    unconditional: torch.Tensor | None,
    guidance: Value,
    temperature: Value,
    top_k: int | torch.Tensor,
    top_p: Value,
    min_p: Value,
) -> None:
    options = {
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    tensors = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    checks.same_device(NAME, logits=logits, noise=noise, unconditional=unconditional, **tensors)
    checks.dtypes(NAME, checks.FLOATS, logits=logits, unconditional=unconditional)
    checks.dtypes(NAME, (torch.float32,), noise=noise)
    checks.shape(NAME, "logits", logits, None, None)
    checks.shape(NAME, "noise", noise, *logits.shape)
    checks.shape(NAME, "unconditional", unconditional, *logits.shape)
    if logits.shape[1] == 0:
        raise ValueError(f"{NAME}: the vocabulary is empty; logits must be (rows, 1 or more).")
    for name, value in tensors.items():
        checks.shape(NAME, name, value, len(logits))
    ranges = {
        "temperature": ("above 0", lambda value: value > 0),
        "top_k": ("0, which keeps all, or above", lambda value: value >= 0),
        "top_p": ("in (0, 1]", lambda value: 0 < value <= 1),
        "min_p": ("in [0, 1]", lambda value: 0 <= value <= 1),
    }
    for name, (words, holds) in ranges.items():
        value = options[name]
        if not isinstance(value, torch.Tensor) and not holds(value):
            raise ValueError(f"{NAME}: {name} is {value}; it must be {words}.")


def _packed(
    logits: torch.Tensor, *options: Value
) -> tuple[torch.Tensor | None, float, float, int, float, float]:
    """The options as one tensor (rows, 5) float32 if any is a tensor, and as plain numbers otherwise."""
    if not any(isinstance(value, torch.Tensor) for value in options):
        guidance, temperature, top_k, top_p, min_p = options
        return None, float(guidance), float(temperature), int(top_k), float(top_p), float(min_p)
    columns = [
        value.float()
        if isinstance(value, torch.Tensor)
        else torch.full((len(logits),), float(value), device=logits.device)
        for value in options
    ]
    return torch.stack(columns, dim=1), 0.0, 1.0, 0, 1.0, 0.0


@torch.library.custom_op(f"{NAMESPACE}::sample_logits", mutates_args=())
def _operation(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from . import triton

    outputs = _outputs(
        logits, noise, unconditional, parameters, guidance, temperature, top_k, top_p, min_p, write
    )
    logits, noise, unconditional = (contiguous_rows(one) for one in (logits, noise, unconditional))
    triton.sample(
        logits, noise, unconditional, parameters, guidance, temperature, top_k, top_p, min_p, write, outputs
    )
    return outputs


@_operation.register_fake
def _outputs(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty((rows,), dtype=torch.int64),
        logits.new_empty((rows,), dtype=torch.float32),
        logits.new_empty(logits.shape if write != NOTHING else (0,), dtype=torch.float32),
    )
