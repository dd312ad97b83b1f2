"""Conversion of VAR's image tokenizer (github.com/FoundationVision/VAR): key map and config inference."""

from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoints import ConversionError
from ...conversion import ConversionPlan, Converter, OriginalArguments, shape_of
from ...key_map import KeyMap, Rename, Rule, Split, StateDict, count
from ..key_rules import coder
from .configuration_multiscale_vq import MultiScaleVQConfig, normalize_patch_nums

RELEASED_PATCH_NUMS = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]  # of the released 256 px models
HITS = "quantize.ema_vocab_hit_SV"


def _attention(theirs: str, ours: str) -> list[Rule]:
    return [
        Rename(f"{theirs}.norm.{{leaf}}", f"{ours}.norm.{{leaf}}"),
        Split(f"{theirs}.qkv.{{leaf}}", *(f"{ours}.{part}.{{leaf}}" for part in "qkv")),
        Rename(f"{theirs}.proj_out.{{leaf}}", f"{ours}.proj.{{leaf}}"),
    ]


TOKENIZER = KeyMap(
    [
        *coder("encoder", "down", "down_blocks", "downsample", _attention),
        *coder("decoder", "up", "up_blocks", "upsample", _attention),
        Rename("quant_conv.{leaf}", "quant_conv.{leaf}"),
        Rename("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
        Rename("quantize.embedding.weight", "quantizer.embedding.weight"),
        Rename("quantize.quant_resi.qresi_ls.{i}.{leaf}", "quantizer.residual_convs.{i}.{leaf}"),
        Rename("quantize.quant_resi.qresi.{leaf}", "quantizer.residual_convs.0.{leaf}"),
        Rename("quantize.quant_resi.{i}.{leaf}", "quantizer.residual_convs.{i}.{leaf}"),
        Rename(HITS, "quantizer.code_usage"),
    ]
)


def tokenizer_config(
    state_dict: StateDict, original_config: Mapping[str, Mapping[str, Any]], patch_nums: list | None = None
) -> MultiScaleVQConfig:
    """
    The configuration that the shapes of a tokenizer imply.

    Args:
        state_dict: the authors' tensors; the hit statistics are replaced by zeros where they are missing or
            count another number of scales, as the authors' loader does.
        original_config: role -> constructor arguments; those of `tokenizer` are read. `norm_num_groups`,
            which the authors fix at 32, may be given too.
        patch_nums: scales of the transformer; without it those given as `v_patch_nums`, and without either
            the released 256 px list, if the hit statistics count as many scales.

    Raises:
        ConversionError: the arguments contradict the weights or the transformer's scales.
    """
    given = OriginalArguments("tokenizer", original_config.get("tokenizer"))
    role = "tokenizer"
    codebook_size, channels = shape_of(state_dict, "quantize.embedding.weight", role, 2)
    base, in_channels, *_ = shape_of(state_dict, "encoder.conv_in.weight", role, 4)
    levels = count(state_dict, "encoder.down.{i}.block.0.conv1.weight")
    widths = [
        shape_of(state_dict, f"encoder.down.{i}.block.0.conv1.weight", role, 4)[0] for i in range(levels)
    ]
    if not widths or any(width % base for width in widths):
        raise ConversionError(
            f"The tokenizer's levels have the widths {widths}, which must be multiples of {base}."
        )
    scales = _scales(state_dict, given, patch_nums)
    _fit_hits(state_dict, len(scales), codebook_size)
    convs, ratio = _residual_convs(state_dict, given)
    given.ignore("test_mode")
    config = {
        "codebook_size": given.agree("vocab_size", codebook_size),
        "latent_channels": given.agree("z_channels", channels),
        "base_channels": given.agree("ch", base),
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": count(state_dict, "encoder.down.0.block.{i}.conv1.weight"),
        "norm_num_groups": _norm_groups(given, base),
        "dropout": given.get("dropout", 0.0),
        "in_channels": in_channels,
        "attention_at_lowest": f"encoder.down.{levels - 1}.attn.0.norm.weight" in state_dict,
        "patch_nums": scales,
        "num_residual_convs": convs,
        "residual_conv_ratio": ratio,
        "normalize_codes": given.get("using_znorm", False),
        "quant_conv_kernel_size": given.agree(
            "quant_conv_ks", shape_of(state_dict, "quant_conv.weight", role, 4)[-1]
        ),
        "commitment_loss_weight": given.get("beta", 0.25),
    }
    given.finish()
    return MultiScaleVQConfig(**config)


def _norm_groups(given: OriginalArguments, width: int) -> int:
    groups = given.get("norm_num_groups", 32)
    if groups < 1 or width % groups:
        raise ConversionError(
            f"The tokenizer's width {width} is not a multiple of norm_num_groups={groups}; give the number "
            "of groups, which the weights do not tell, as original_config['tokenizer']['norm_num_groups']."
        )
    return groups


def _scales(state_dict: StateDict, given: OriginalArguments, patch_nums: list | None) -> list:
    asked = given.get("v_patch_nums")
    if asked is not None:
        asked = normalize_patch_nums(asked)
    if patch_nums is not None:
        if asked is not None and asked != patch_nums:
            given.contradiction("v_patch_nums", f"{patch_nums} (the transformer's scales)")
        return patch_nums
    if asked is not None:
        return asked
    counted = state_dict[HITS].shape[0] if HITS in state_dict else None
    if counted != len(RELEASED_PATCH_NUMS):
        raise ConversionError(
            f"The tokenizer was made for {counted or 'an unknown number of'} scales, whose sizes its weights "
            "do not tell; give them as original_config['tokenizer']['v_patch_nums']."
        )
    return RELEASED_PATCH_NUMS


def _fit_hits(state_dict: StateDict, num_scales: int, codebook_size: int) -> None:
    if HITS not in state_dict or state_dict[HITS].shape[0] != num_scales:
        state_dict[HITS] = torch.zeros(num_scales, codebook_size)


def _residual_convs(state_dict: StateDict, given: OriginalArguments) -> tuple[int, float]:
    """Number of convolutions phi and the share that they have in the sum."""
    partly_shared = count(state_dict, "quantize.quant_resi.qresi_ls.{i}.weight")
    per_scale = count(state_dict, "quantize.quant_resi.{i}.weight")
    shared = int("quantize.quant_resi.qresi.weight" in state_dict)
    # share_quant_resi is 0 for one each, 1 for one in all, otherwise their number.
    forms = [(0, per_scale), (1, shared), (partly_shared, partly_shared)]
    present = [form for form in forms if form[1]]
    if len(present) > 1:
        raise ConversionError(
            "The tokenizer names its residual convolutions (quantize.quant_resi) in two ways."
        )
    ratio = abs(given.get("quant_resi", 0.5 if present else 0.0))
    if bool(present) != (ratio > 1e-6):
        given.contradiction("quant_resi", f"there are {'some' if present else 'no'} residual convolutions")
    if not present:
        given.ignore("share_quant_resi", "default_qresi_counts")
        return 0, 0.0
    ((share, number),) = present
    given.agree("share_quant_resi", share)
    if given.get("default_qresi_counts") and not share:
        given.agree("default_qresi_counts", number)
    return number, ratio


def _plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    from .modeling_multiscale_vq import MultiScaleVQModel

    config = tokenizer_config(weights["tokenizer"], original_config)
    return ConversionPlan(MultiScaleVQModel, config, {"tokenizer": TOKENIZER})


CONVERTER = Converter(family="multiscale_vq", roles={"tokenizer": TOKENIZER}, plan=_plan)
