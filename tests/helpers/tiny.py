"""Small models and tokenizers with random weights."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, PreTrainedTokenizerFast

from hf_argen import (
    KlVaeConfig,
    LlamaGenConfig,
    LlamaGenForImageGeneration,
    LlamaGenVQConfig,
    MarConfig,
    MarForImageGeneration,
    MaskGitConfig,
    MaskGitForImageGeneration,
    MaskGitVQConfig,
    MultiScaleVQConfig,
    RarConfig,
    RarForImageGeneration,
    TitokConfig,
    VarConfig,
    VarForImageGeneration,
)

PROMPTS = ["red apple", "green tree", "blue car", "a cat and a dog"]


def tokenizer_config(**changes) -> MultiScaleVQConfig:
    """An image tokenizer of 16x16 pixels and 4x4 cells."""
    fields = {
        "codebook_size": 16,
        "latent_channels": 4,
        "base_channels": 8,
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
        "patch_nums": [1, 2, 4],
    }
    return MultiScaleVQConfig(**{**fields, **changes})


def var_config(**changes) -> VarConfig:
    """A class-conditional VAR of two layers on that tokenizer."""
    fields = {
        "image_tokenizer_config": tokenizer_config(),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_classes": 5,
    }
    return VarConfig(**{**fields, **changes})


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A `tokenizers` tokenizer trained on a few prompts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        PROMPTS,
        trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[PAD]", "[UNK]"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as most language models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        PROMPTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def text_encoder_config(vocab_size: int, **changes) -> BertConfig:
    """A text encoder of one layer."""
    fields = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return BertConfig(vocab_size=vocab_size, **{**fields, **changes})


def text_var_config(vocab_size: int) -> VarConfig:
    """A text-conditional VAR with a text encoder of one layer."""
    return var_config(condition_type="text", text_encoder_config=text_encoder_config(vocab_size))


def spread(model: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Random weights that are large enough for logits to differ; a fresh model is near uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("image_tokenizer.") and parameter.ndim > 1:
                parameter.normal_(std=std)
    return model.eval()


@cache
def sized_var(seed: int) -> VarForImageGeneration:
    """
    A model whose saving takes long enough to be hit in the middle: about 9 MB. Read only.

    Args:
        seed: of its weights.
    """
    torch.manual_seed(seed)
    sizes = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 768}
    return VarForImageGeneration(var_config(**sizes)).eval()


def tiny_var(**changes) -> VarForImageGeneration:
    """The class-conditional model with spread weights."""
    return spread(VarForImageGeneration(var_config(**changes)))


def llamagen_vq_config(**changes) -> LlamaGenVQConfig:
    """A VQ tokenizer of 2x2 pixels a token."""
    fields = {
        "codebook_size": 16,
        "codebook_dim": 4,
        "latent_channels": 8,
        "base_channels": 8,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
    }
    return LlamaGenVQConfig(**{**fields, **changes})


def llamagen_config(**changes) -> LlamaGenConfig:
    """A class-conditional LlamaGen of two layers and 4x4 tokens on that tokenizer, without dropout."""
    fields = {
        "grid_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_classes": 5,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "mlp_dropout": 0.0,
        "condition_dropout": 0.0,
    }
    if "image_tokenizer_config" in changes:
        del fields["grid_size"]
    else:
        fields["image_tokenizer_config"] = llamagen_vq_config()
    return LlamaGenConfig(**{**fields, **changes})


def tiny_llamagen(**changes) -> LlamaGenForImageGeneration:
    """The class-conditional model with spread weights."""
    return spread(LlamaGenForImageGeneration(llamagen_config(**changes)))


def maskgit_vq_config(**changes) -> MaskGitVQConfig:
    """A VQ tokenizer of 2x2 pixels a token, with a level that changes the width."""
    fields = {
        "codebook_size": 16,
        "codebook_dim": 4,
        "base_channels": 8,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "norm_num_groups": 4,
    }
    return MaskGitVQConfig(**{**fields, **changes})


def rar_config(**changes) -> RarConfig:
    """A class-conditional RAR of two layers and 4x4 tokens on that tokenizer, without dropout and random orders."""
    fields = {
        "grid_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_classes": 5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "condition_dropout": 0.0,
    }
    if "image_tokenizer_config" in changes:
        del fields["grid_size"]
    else:
        fields["image_tokenizer_config"] = maskgit_vq_config()
    return RarConfig(**{**fields, **changes})


def tiny_rar(**changes) -> RarForImageGeneration:
    """The class-conditional model with spread weights."""
    return spread(RarForImageGeneration(rar_config(**changes)))


def kl_vae_config(**changes) -> KlVaeConfig:
    """A KL autoencoder of 2x2 pixels a latent."""
    fields = {
        "latent_channels": 4,
        "latent_scale": 0.5,
        "base_channels": 8,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "encoder_attention_levels": [1],
        "norm_num_groups": 4,
    }
    return KlVaeConfig(**{**fields, **changes})


SMALL_DIFFUSION = {
    "type": "diffusion",
    "width": 16,
    "depth": 1,
    "num_sampling_steps": 5,
    "batch_multiplier": 2,
}


def titok_config(**changes) -> TitokConfig:
    """Five tokens of pictures of 8x8 pixels, drawn by another tokenizer."""
    fields = {
        "image_size": 8,
        "patch_size": 2,
        "num_latent_tokens": 5,
        "latent_channels": 4,
        "codebook_size": 16,
        "pixel_decoder_config": maskgit_vq_config(),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return TitokConfig(**{**fields, **changes})


_SMALL = {"width": 16, "depth": 1}
SMALL_HEADS = {
    "diffusion": SMALL_DIFFUSION,
    "flow": {"type": "flow", **_SMALL, "num_sampling_steps": 5, "batch_multiplier": 2},
    "shortcut": {"type": "shortcut", **_SMALL, "num_sampling_steps": 4, "batch_multiplier": 2},
    "mixture": {
        "type": "mixture",
        **_SMALL,
        "num_heads": 2,
        "num_components": 2,
        "num_candidates": 20,
    },
    "energy": {"type": "energy", **_SMALL, "noise_size": 8},
}
"""A small head of each kind."""


def mar_config(**changes) -> MarConfig:
    """A class-conditional MAR of one layer each and 4x4 tokens on that autoencoder, without dropout."""
    fields = {
        "image_tokenizer_config": kl_vae_config(),
        "grid_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_buffer_tokens": 3,
        "num_classes": 5,
        "head_config": SMALL_DIFFUSION,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "condition_dropout": 0.0,
    }
    return MarConfig(**{**fields, **changes})


def tiny_mar(**changes) -> MarForImageGeneration:
    """The class-conditional model with spread weights but for its head, which is tamer, so that tokens stay small."""
    model = spread(MarForImageGeneration(mar_config(**changes)))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(0.3)
    return model


def maskgit_config(**changes) -> MaskGitConfig:
    """A class-conditional ImageBert of two layers on the five tokens of that TiTok, without dropout."""
    fields = {
        "image_tokenizer_config": titok_config(),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_classes": 5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "condition_dropout": 0.0,
    }
    return MaskGitConfig(**{**fields, **changes})


def tiny_maskgit(**changes) -> MaskGitForImageGeneration:
    """The class-conditional model with spread weights."""
    return spread(MaskGitForImageGeneration(maskgit_config(**changes)))


NEXT_TOKEN_FAMILIES = {
    "llamagen": (tiny_llamagen, llamagen_vq_config),
    "rar": (tiny_rar, maskgit_vq_config),
}
"""Families that draw token by token: how to make a tiny model of each, and the configuration of its tokenizer."""


def tiny_next_token(family: str, codes: int = 16, grid=(4, 4), **changes) -> torch.nn.Module:
    """The class-conditional model of a family that draws token by token, with so many codes on such a grid."""
    make, tokenizer = NEXT_TOKEN_FAMILIES[family]
    return make(image_tokenizer_config=tokenizer(codebook_size=codes, grid_size=list(grid)), **changes)
