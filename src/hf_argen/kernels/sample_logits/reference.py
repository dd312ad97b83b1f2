"""Guidance, truncation and one draw from each row of logits, in plain PyTorch: the definition."""

import torch

Value = float | torch.Tensor


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
    """See [`hf_argen.kernels.sample_logits.sample_logits`]."""
    scores, is_valid, is_empty = _filtered(logits, unconditional, guidance, temperature, top_k, top_p, min_p)
    probs = scores.softmax(dim=-1)
    race = scores if noise is None else probs / noise
    tokens = torch.where(is_valid, race.argmax(dim=-1), 0)
    chosen = scores.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    log_probs = torch.where(is_valid, chosen, torch.where(is_empty, -torch.inf, torch.nan))
    return tokens, log_probs, torch.where(is_valid.unsqueeze(-1), probs, torch.nan) if return_probs else None


def filter_logits(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None = None,
    guidance: Value = 0.0,
    temperature: Value = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: Value = 1.0,
    min_p: Value = 0.0,
) -> torch.Tensor:
    """See [`hf_argen.kernels.sample_logits.filter_logits`]."""
    scores, is_valid, is_empty = _filtered(logits, unconditional, guidance, temperature, top_k, top_p, min_p)
    return torch.where((is_valid | is_empty).unsqueeze(-1), scores, torch.nan)


def _filtered(
    logits: torch.Tensor,
    unconditional: torch.Tensor | None,
    guidance: Value,
    temperature: Value,
    top_k: int | torch.Tensor,
    top_p: Value,
    min_p: Value,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (rows, vocab), -inf where removed; which rows are sound, and which allow no token at all."""
    scores = logits.float()
    if unconditional is not None:
        other = unconditional.float()
        scores = other + (1 + _column(guidance, scores)) * (scores - other)
    temperature = _column(temperature, scores)
    scores = scores / temperature
    best = scores.amax(dim=-1, keepdim=True)  # NaN, if there is one
    is_sound = (temperature > 0).squeeze(-1)
    is_empty = is_sound & (best == -torch.inf).squeeze(-1)
    scores = _largest(scores, _column(top_k, scores))
    scores = _nucleus(scores, _column(top_p, scores))
    # In logarithms, since the probabilities of a large vocabulary may vanish.
    scores = scores.masked_fill(scores - best < _column(min_p, scores).float().log(), -torch.inf)
    return scores, is_sound & best.isfinite().squeeze(-1), is_empty


def _column(value: Value, scores: torch.Tensor) -> torch.Tensor:
    """One value for each row, (rows, 1)."""
    return torch.as_tensor(value, device=scores.device).expand(len(scores)).unsqueeze(-1)


def _largest(scores: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """All but the `top_k` (rows, 1) largest scores, and what equals the last of them, become -inf; 0 keeps all."""
    vocab = scores.shape[-1]
    applies = (top_k > 0) & (top_k < vocab)
    most = int(torch.where(applies, top_k, 1).max()) if len(scores) else 1
    last = scores.topk(most, dim=-1).values.gather(-1, (top_k.clamp(1, most) - 1).long())
    return scores.masked_fill((scores < last) & applies, -torch.inf)


def _nucleus(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The largest scores whose probabilities reach `top_p` (rows, 1), and what equals the last of them, stay."""
    ordered, _ = scores.sort(dim=-1, descending=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    reached = mass >= top_p * mass[:, -1:]
    least = ordered.gather(-1, reached.int().argmax(dim=-1, keepdim=True))
    return scores.masked_fill((scores < least) & (top_p < 1), -torch.inf)
