"""Conversion of MAR (github.com/LTH14/mar, arXiv 2406.11838): key map and config inference."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

from ..checkpoints import ConversionError
from ..conversion import ConversionPlan, Converter, OriginalArguments, shape_of
from ..key_map import KeyMap, Rename, StateDict, Unbatched, count
from ..key_rules import timm_block
from ..tokenizers.kl_vae.configuration_kl_vae import KlVaeConfig
from ..tokenizers.kl_vae.convert_kl_vae import NESTINGS, TOKENIZER, tokenizer_config
from ..tokenizers.kl_vae.convert_kl_vae import plan as plan_tokenizer
from .configuration_mar import MarConfig

RELEASED_HEADS = {768: 12, 1024: 16, 1280: 16}  # attention heads by width, which the weights do not tell
NET, OUR_NET = "diffloss.net", "head.net"


TRANSFORMER = KeyMap(
    [
        Rename("class_emb.weight", "model.class_embedding.weight"),
        Rename("fake_latent", "model.null_embedding.weight"),
        Rename("z_proj.{leaf}", "model.embed_tokens.{leaf}"),
        Rename("z_proj_ln.{leaf}", "model.embed_norm.{leaf}"),
        Unbatched("encoder_pos_embed_learned", "model.encoder_position_embedding.weight"),
        *timm_block("encoder_blocks.{i}", "model.encoder_layers.{i}"),
        Rename("encoder_norm.{leaf}", "model.encoder_norm.{leaf}"),
        Rename("decoder_embed.{leaf}", "model.decoder_proj.{leaf}"),
        Unbatched("mask_token", "model.mask_embedding.weight"),
        Unbatched("decoder_pos_embed_learned", "model.decoder_position_embedding.weight"),
        *timm_block("decoder_blocks.{i}", "model.decoder_layers.{i}"),
        Rename("decoder_norm.{leaf}", "model.decoder_norm.{leaf}"),
        Unbatched("diffusion_pos_embed_learned", "model.output_position_embedding.weight"),
        Rename(f"{NET}.time_embed.mlp.0.{{leaf}}", f"{OUR_NET}.time_embeddings.0.fc1.{{leaf}}"),
        Rename(f"{NET}.time_embed.mlp.2.{{leaf}}", f"{OUR_NET}.time_embeddings.0.fc2.{{leaf}}"),
        Rename(f"{NET}.cond_embed.{{leaf}}", f"{OUR_NET}.condition_proj.{{leaf}}"),
        Rename(f"{NET}.input_proj.{{leaf}}", f"{OUR_NET}.input_proj.{{leaf}}"),
        Rename(f"{NET}.res_blocks.{{i}}.in_ln.{{leaf}}", f"{OUR_NET}.blocks.{{i}}.norm.{{leaf}}"),
        Rename(f"{NET}.res_blocks.{{i}}.mlp.0.{{leaf}}", f"{OUR_NET}.blocks.{{i}}.fc1.{{leaf}}"),
        Rename(f"{NET}.res_blocks.{{i}}.mlp.2.{{leaf}}", f"{OUR_NET}.blocks.{{i}}.fc2.{{leaf}}"),
        Rename(
            f"{NET}.res_blocks.{{i}}.adaLN_modulation.1.{{leaf}}",
            f"{OUR_NET}.blocks.{{i}}.modulation.{{leaf}}",
        ),
        Rename(f"{NET}.final_layer.adaLN_modulation.1.{{leaf}}", f"{OUR_NET}.output.modulation.{{leaf}}"),
        Rename(f"{NET}.final_layer.linear.{{leaf}}", f"{OUR_NET}.output.linear.{{leaf}}"),
    ]
)


def transformer_config(
    state_dict: StateDict,
    original_config: Mapping[str, Mapping[str, Any]],
    tokenizer: KlVaeConfig | None = None,
    role: str = "transformer",
) -> dict[str, Any]:
    """
    The fields of [`MarConfig`], but for the tokenizer's, that the shapes of a transformer imply.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> constructor arguments; those of `role` are read.
        tokenizer: of the autoencoder, where it is converted, too.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    given = OriginalArguments(role, original_config.get(role))
    classes, hidden = shape_of(state_dict, "class_emb.weight", role, 2)
    _, positions, _ = shape_of(state_dict, "encoder_pos_embed_learned", role, 3)
    _, tokens, width = shape_of(state_dict, "diffusion_pos_embed_learned", role, 3)
    token_size = shape_of(state_dict, "z_proj.weight", role, 2)[1]
    head_width = shape_of(state_dict, f"{NET}.input_proj.weight", role, 2)[0]
    side = math.isqrt(tokens)
    if side * side != tokens or positions <= tokens:
        raise ConversionError(
            f"The {role} has {tokens} tokens and {positions} positions, which are no square picture behind a buffer; the "
            "file is damaged or of another family."
        )
    patch = _patch_size(given, token_size, tokenizer, role)
    stride = given.get("vae_stride", 16 if tokenizer is None else tokenizer.downsampling_factor)
    given.agree("img_size", side * stride * patch)
    given.agree("encoder_embed_dim", hidden)
    given.agree("decoder_embed_dim", width)
    _check_norm(given)
    given.ignore("grad_checkpointing")
    config = {
        "grid_size": side,
        "patch_size": patch,
        "latent_channels": given.agree("vae_embed_dim", token_size // patch**2),
        "hidden_size": hidden,
        "decoder_hidden_size": width,
        "num_buffer_tokens": given.agree("buffer_size", positions - tokens),
        "min_mask_ratio": given.get("mask_ratio_min", 0.7),
        "num_classes": given.agree("class_num", classes),
        "condition_dropout": given.get("label_drop_prob", 0.1),
        "attention_dropout": given.get("attn_dropout", 0.1),
        "hidden_dropout": given.get("proj_dropout", 0.1),
        "head_config": {
            "type": "diffusion",
            "width": given.agree("diffloss_w", head_width),
            "depth": given.agree("diffloss_d", count(state_dict, f"{NET}.res_blocks.{{i}}.in_ln.weight")),
            "num_sampling_steps": given.get("num_sampling_steps", "100"),
            "batch_multiplier": given.get("diffusion_batch_mul", 4),
        },
    }
    ratio = given.get("mlp_ratio", 4.0)
    for name, prefix, size in (("encoder", "", hidden), ("decoder", "decoder_", width)):
        mlp = shape_of(state_dict, f"{name}_blocks.0.mlp.fc1.weight", role, 2)[0]
        if "mlp_ratio" in given.given and int(size * ratio) != mlp:
            given.contradiction("mlp_ratio", mlp / size)
        config[f"{prefix}intermediate_size"] = mlp
        depth = count(state_dict, f"{name}_blocks.{{i}}.attn.proj.weight")
        config[f"{prefix}num_hidden_layers"] = given.agree(f"{name}_depth", depth)
        config[f"{prefix}num_attention_heads"] = _heads(given, name, size, role)
    given.finish()
    return config


def _patch_size(given: OriginalArguments, token_size: int, tokenizer: KlVaeConfig | None, role: str) -> int:
    """Latents per side of a token, from the channels of a latent, or else as given, or else 1."""
    latent = given.get("vae_embed_dim") or (tokenizer and tokenizer.latent_channels)
    patch = math.isqrt(token_size // latent) if latent else given.get("patch_size", 1)
    if patch < 1 or (latent or token_size // patch**2) * patch**2 != token_size:
        raise ConversionError(
            f"The {role} has tokens of {token_size} channels, which are no square of latents with {latent} channels; give "
            "the autoencoder and the arguments that belong to it."
        )
    return given.agree("patch_size", patch)


def _heads(given: OriginalArguments, name: str, width: int, role: str) -> int:
    heads = given.get(f"{name}_num_heads", RELEASED_HEADS.get(width))
    if heads is None:
        raise ConversionError(
            f"The weights of the {role} do not tell its attention heads; give original_config[{role!r}]"
            f"['{name}_num_heads']."
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConversionError(
            f"original_config[{role!r}] says {name}_num_heads={heads!r}, which does not divide the width {width}."
        )
    return heads


def _check_norm(given: OriginalArguments) -> None:
    """All released checkpoints have layer norms with eps 1e-6."""
    if "1e-6" not in str(given.get("norm_layer", "eps 1e-6")).replace("1e-06", "1e-6"):
        given.contradiction("norm_layer", "nothing; this family has layer norms with eps 1e-6")


def _plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    if "transformer" not in weights:
        return plan_tokenizer(weights, original_config)
    from .modeling_mar import MarForImageGeneration

    tokenizer = tokenizer_config(weights["tokenizer"], original_config) if "tokenizer" in weights else None
    fields = transformer_config(weights["transformer"], original_config, tokenizer)
    key_maps = {"transformer": TRANSFORMER, "tokenizer": TOKENIZER.under("image_tokenizer.")}
    return ConversionPlan(
        model_class=MarForImageGeneration,
        config=MarConfig(image_tokenizer_config=tokenizer, **fields),
        key_maps={role: key_map for role, key_map in key_maps.items() if role in weights},
        generation={"do_sample": True, "temperature": 1.0},
    )


CONVERTER = Converter(
    family="mar",
    roles={"transformer": TRANSFORMER, "tokenizer": TOKENIZER},
    plan=_plan,
    containers={"transformer_raw": {"transformer": ("model",)}},
    nestings={"transformer": (("model_ema",), ("model",)), "tokenizer": NESTINGS},
    allowed_globals=(argparse.Namespace,),
)
