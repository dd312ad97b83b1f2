"""Prompts as one vector per picture."""

import torch
from transformers import PreTrainedConfig


def pool_tokens(embeddings: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean (batch, dim) of token embeddings (batch, tokens, dim), over those that the mask (batch, tokens) keeps."""
    if attention_mask is None:
        return embeddings.mean(dim=1)
    weights = attention_mask.to(embeddings.dtype).unsqueeze(-1)
    return (embeddings * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def check_prompts(
    prompt_embeds: torch.Tensor | None,
    prompt_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    width: int,
    encoder_config: PreTrainedConfig | None,
) -> None:
    """
    Refuses prompts that are missing, given twice, or of a shape or range that the model does not take.

    Args:
        width: of `prompt_embeds`.
        encoder_config: of the text encoder that reads `prompt_ids`; `None` if there is none.
    """
    if (prompt_embeds is None) == (prompt_ids is None):
        raise ValueError("This model draws from text; give either prompt_ids or prompt_embeds.")
    if prompt_ids is not None:
        _check_ids(prompt_ids, encoder_config)
        shape = prompt_ids.shape
    else:
        shape = prompt_embeds.shape
        if len(shape) not in (2, 3) or shape[-1] != width or 0 in shape:
            raise ValueError(
                f"prompt_embeds have the shape {tuple(shape)}; this model takes (batch, {width}) or (batch, tokens, "
                f"{width})."
            )
    is_pooled = prompt_ids is None and len(shape) == 2
    if attention_mask is not None and not is_pooled and attention_mask.shape != shape[:2]:
        raise ValueError(
            f"prompt_attention_mask has the shape {tuple(attention_mask.shape)}; these prompts have {tuple(shape[:2])}."
        )


def _check_ids(prompt_ids: torch.Tensor, encoder_config: PreTrainedConfig | None) -> None:
    if encoder_config is None:
        raise ValueError("This model has no text encoder; give prompt_embeds.")
    if prompt_ids.ndim != 2 or 0 in prompt_ids.shape or prompt_ids.is_floating_point():
        raise ValueError(
            f"prompt_ids are {prompt_ids.dtype} of the shape {tuple(prompt_ids.shape)}; give whole numbers (batch, "
            "tokens)."
        )
    vocab_size = getattr(encoder_config, "vocab_size", None)
    if vocab_size is not None and not 0 <= int(prompt_ids.min()) <= int(prompt_ids.max()) < vocab_size:
        raise ValueError(
            f"prompt_ids lie in [{int(prompt_ids.min())}, {int(prompt_ids.max())}]; the text encoder has {vocab_size} "
            "tokens: use the tokenizer that was saved with the model."
        )
    longest = getattr(encoder_config, "max_position_embeddings", None)
    if longest is not None and prompt_ids.shape[1] > longest:
        raise ValueError(f"A prompt has {prompt_ids.shape[1]} tokens; the text encoder takes {longest}.")
