"""Small language models of transformers with random weights, of several kinds of attention."""

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from .tiny import spread

VOCAB, PAD, BOS, EOS = 40, 0, 1, 3
NAMES = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZES = {
    **NAMES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
LAYERS = ["sliding_attention", "full_attention"]
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "gpt2": (  # learned positions
        GPT2LMHeadModel,
        GPT2Config,
        {**NAMES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {**SIZES, "sliding_window": 5}),  # all layers slide
    "gemma3": (  # one of two layers slides
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {**SIZES, "head_dim": 8, "sliding_window": 5, "layer_types": LAYERS},
    ),
}


def language_model(kind: str = "llama", attn_implementation: str = "sdpa", **changes: Any) -> PreTrainedModel:
    """A model of two layers whose outputs depend on its inputs."""
    model_class, config_class, fields = KINDS[kind]
    config = config_class(**{**fields, **changes})
    torch.manual_seed(1)
    model = spread(model_class._from_config(config, attn_implementation=attn_implementation))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def prompts(batch_size: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    """Prompts of unequal length, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(EOS + 1, VOCAB, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch_size):
        mask[row, : (3 * row + 2) % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
