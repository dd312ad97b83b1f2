"""Conversion of VAR (github.com/FoundationVision/VAR, arXiv 2404.02905): key map and config inference."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

from ..checkpoints import ConversionError
from ..conversion import ConversionPlan, Converter, OriginalArguments, shape_of
from ..key_map import Drop, KeyMap, Rename, Reshape, Split, StateDict, count
from ..tokenizers.multiscale_vq.configuration_multiscale_vq import grid_sizes, normalize_patch_nums
from ..tokenizers.multiscale_vq.convert_multiscale_vq import CONVERTER as TOKENIZER_CONVERTER
from ..tokenizers.multiscale_vq.convert_multiscale_vq import TOKENIZER, tokenizer_config
from .configuration_var import VarConfig

_THEIRS, _OURS = "blocks.{i}", "model.layers.{i}"

TRANSFORMER = KeyMap(
    [
        Rename("word_embed.{leaf}", "model.input_projection.{leaf}"),
        Rename("class_emb.weight", "model.class_embedding.weight"),
        Rename("pos_start", "model.start_embedding"),
        Rename("pos_1LC", "model.position_embedding"),
        Rename("lvl_embed.weight", "model.scale_embedding.weight"),
        Split(f"{_THEIRS}.attn.mat_qkv.weight", *(f"{_OURS}.self_attn.{part}_proj.weight" for part in "qkv")),
        Rename(f"{_THEIRS}.attn.q_bias", f"{_OURS}.self_attn.q_proj.bias"),
        Rename(f"{_THEIRS}.attn.v_bias", f"{_OURS}.self_attn.v_proj.bias"),
        Reshape(
            f"{_THEIRS}.attn.scale_mul_1H11",
            f"{_OURS}.self_attn.logit_scale",
            ours=(-1,),
            theirs=(1, -1, 1, 1),
        ),
        Rename(f"{_THEIRS}.attn.proj.{{leaf}}", f"{_OURS}.self_attn.o_proj.{{leaf}}"),
        Rename(f"{_THEIRS}.ffn.fc1.{{leaf}}", f"{_OURS}.mlp.fc1.{{leaf}}"),
        Rename(f"{_THEIRS}.ffn.fc2.{{leaf}}", f"{_OURS}.mlp.fc2.{{leaf}}"),
        Rename(f"{_THEIRS}.ada_lin.1.{{leaf}}", f"{_OURS}.modulation.linear.{{leaf}}"),
        Reshape(f"{_THEIRS}.ada_gss", f"{_OURS}.modulation.table", ours=(6, -1), theirs=(1, 1, 6, -1)),
        Rename("shared_ada_lin.1.{leaf}", "model.shared_modulation.linear.{leaf}"),
        Rename("head_nm.ada_lin.1.{leaf}", "model.norm.linear.{leaf}"),
        Rename("head.{leaf}", "head.out_proj.{leaf}"),
        Drop("lvl_1L"),
        Drop("attn_bias_for_masking"),
        Drop(f"{_THEIRS}.attn.zero_k_bias"),
    ]
)


def transformer_config(
    state_dict: StateDict, original_config: Mapping[str, Mapping[str, Any]], role: str = "transformer"
) -> dict[str, Any]:
    """
    The fields of [`VarConfig`], but for the tokenizer's, that the shapes of a transformer imply.

    Without the learned scale of query and key (`attn_l2_norm=False`) the weights do not tell the number of
    heads: it is `num_heads` where given, otherwise heads of width 64 as in all released models.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> constructor arguments; those of `role` are read.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    given = OriginalArguments(role, original_config.get(role))
    classes, width = shape_of(state_dict, "class_emb.weight", role, 2)
    vocab_size, _ = shape_of(state_dict, "head.weight", role, 2)
    mlp_width, _ = shape_of(state_dict, "blocks.0.ffn.fc1.weight", role, 2)
    if round(width * given.get("mlp_ratio", mlp_width / width)) != mlp_width:
        given.contradiction("mlp_ratio", mlp_width / width)
    given.ignore("flash_if_available", "fused_if_available", "vae_kwargs")
    use_qk_norm = "blocks.0.attn.scale_mul_1H11" in state_dict
    config = {
        "vocab_size": vocab_size,
        "codebook_dim": shape_of(state_dict, "word_embed.weight", role, 2)[1],
        "num_classes": given.agree("num_classes", classes - 1),
        "patch_nums": _scales(state_dict, given),
        "hidden_size": given.agree("embed_dim", width),
        "num_hidden_layers": given.agree("depth", count(state_dict, "blocks.{i}.attn.mat_qkv.weight")),
        "num_attention_heads": _heads(state_dict, given, width, use_qk_norm),
        "intermediate_size": mlp_width,
        "layer_norm_eps": given.get("norm_eps", 1e-6),
        "hidden_dropout": given.get("drop_rate", 0.0),
        "attention_dropout": given.get("attn_drop_rate", 0.0),
        "drop_path_rate": given.get("drop_path_rate", 0.0),
        "use_qk_norm": given.agree("attn_l2_norm", use_qk_norm),
        "shared_adaln": given.agree("shared_aln", "blocks.0.ada_gss" in state_dict),
        "condition_dropout": given.get("cond_drop_rate", 0.1),
    }
    given.finish()
    return config


def _heads(state_dict: StateDict, given: OriginalArguments, width: int, use_qk_norm: bool) -> int:
    if use_qk_norm:
        return given.agree(
            "num_heads", shape_of(state_dict, "blocks.0.attn.scale_mul_1H11", given.role, 4)[1]
        )
    heads = given.get("num_heads", width // 64 if width % 64 == 0 else None)
    if heads is None or width % heads:
        raise ConversionError(
            f"The {given.role} is {width} wide and has no learned scale that would tell its heads; give "
            f"their number, a divisor of {width}, as original_config[{given.role!r}]['num_heads']."
        )
    return heads


def _scales(state_dict: StateDict, given: OriginalArguments) -> list:
    """The list of scales, from the scale index of every token; a given list must agree with it."""
    asked = given.get("patch_nums")
    lengths = _scale_lengths(state_dict, given.role)
    if asked is not None:
        scales = normalize_patch_nums(asked)
        if [height * width for height, width in grid_sizes(scales)] != lengths:
            given.contradiction("patch_nums", f"the scales have {lengths} tokens")
        return scales
    if any(math.isqrt(length) ** 2 != length for length in lengths):
        raise ConversionError(
            f"The scales of the {given.role} have {lengths} tokens, which are not all squares; give their "
            f"sides as original_config[{given.role!r}]['patch_nums']."
        )
    return [math.isqrt(length) for length in lengths]


def _scale_lengths(state_dict: StateDict, role: str) -> list[int]:
    _, tokens = shape_of(state_dict, "lvl_1L", role, 2)
    index = state_dict["lvl_1L"][0].long()
    lengths = index.clamp(min=0).bincount().tolist()
    expected = [scale for scale, length in enumerate(lengths) for _ in range(length)]
    if index.tolist() != expected or 0 in lengths or not tokens:
        raise ConversionError(f"The key lvl_1L of the {role} is not a list of scales in ascending order.")
    return lengths


def _plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    if "transformer" not in weights:
        return TOKENIZER_CONVERTER.plan(weights, original_config)
    if "tokenizer" not in weights:
        raise ConversionError(
            "The role 'tokenizer' is missing: VAR's transformer files never hold the image tokenizer. Give "
            "its file too, for the released models vae_ch160v4096z32.pth."
        )
    from .modeling_var import VarForImageGeneration

    fields = transformer_config(weights["transformer"], original_config)
    # The constructor of the authors' Hub class holds the tokenizer's arguments within its own.
    nested = (original_config.get("transformer") or {}).get("vae_kwargs")
    if nested:
        original_config = {"tokenizer": {**nested, **(original_config.get("tokenizer") or {})}}
    tokenizer = tokenizer_config(weights["tokenizer"], original_config, fields["patch_nums"])
    check_same_codes(fields, tokenizer, "transformer")
    return ConversionPlan(
        model_class=VarForImageGeneration,
        config=VarConfig(image_tokenizer_config=tokenizer, **fields),
        key_maps={"transformer": TRANSFORMER, "tokenizer": TOKENIZER.under("image_tokenizer.")},
        generation={"do_sample": True, "guidance_scale": 1.5, "top_k": 0, "top_p": 1.0},
    )


def check_same_codes(fields: Mapping[str, Any], tokenizer: Any, role: str) -> None:
    """Refuses a transformer and a tokenizer that were not made for each other."""
    own, theirs = (
        (fields["vocab_size"], fields["codebook_dim"]),
        (tokenizer.codebook_size, tokenizer.latent_channels),
    )
    if own != theirs:
        raise ConversionError(
            f"The {role} was trained on {own[0]} codes of {own[1]} channels, but the tokenizer has "
            f"{theirs[0]} of {theirs[1]}; give the tokenizer that belongs to it."
        )


CONVERTER = Converter(
    family="var",
    roles={"transformer": TRANSFORMER, "tokenizer": TOKENIZER},
    plan=_plan,
    # ar-ckpt-last.pth and ar-ckpt-best.pth of the authors' trainer
    containers={"trainer": {"transformer": ("trainer", "var_wo_ddp"), "tokenizer": ("trainer", "vae_local")}},
    allowed_globals=(argparse.Namespace,),
    hub_roles=("transformer",),
)
