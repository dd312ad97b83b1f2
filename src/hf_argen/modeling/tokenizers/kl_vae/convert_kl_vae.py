"""Conversion of the KL-16 autoencoder of MAR (github.com/LTH14/mar, arXiv 2406.11838): key map and config inference."""

import argparse
from collections.abc import Mapping
from typing import Any

from ...checkpoints import ConversionError
from ...conversion import ConversionPlan, Converter, OriginalArguments, shape_of
from ...key_map import KeyMap, Rename, StateDict, count
from ..key_rules import coder
from .configuration_kl_vae import RELEASED_SCALE, KlVaeConfig

TOKENIZER = KeyMap(
    [
        *coder("encoder", "down", "down_blocks", "downsample"),
        *coder("decoder", "up", "up_blocks", "upsample"),
        Rename("quant_conv.{leaf}", "quant_conv.{leaf}"),
        Rename("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
    ]
)


def tokenizer_config(
    state_dict: StateDict,
    original_config: Mapping[str, Mapping[str, Any]],
    grid_size: int | list[int] | None = None,
) -> KlVaeConfig:
    """
    The configuration that the shapes of an autoencoder imply.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> constructor arguments; those of `tokenizer` are read, with those of the authors' encoder
            and decoder classes (`ch`, `num_res_blocks`, ...) and `latent_scale`, which is no argument of theirs: the
            factor that their scripts multiply latents with, by default that of KL-16. `norm_num_groups`, which they fix
            at 32, may be given, too.
        grid_size: grid of latents of the generator; `None` for pictures of any size.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    role = "tokenizer"
    given = OriginalArguments(role, original_config.get(role))
    latent = shape_of(state_dict, "post_quant_conv.weight", role, 4)[0]
    base, in_channels, *_ = shape_of(state_dict, "encoder.conv_in.weight", role, 4)
    moments, features, *_ = shape_of(state_dict, "quant_conv.weight", role, 4)
    levels = count(state_dict, "encoder.down.{i}.block.0.conv1.weight")
    widths = [
        shape_of(state_dict, f"encoder.down.{i}.block.0.conv1.weight", role, 4)[0] for i in range(levels)
    ]
    if not widths or any(width % base for width in widths):
        raise ConversionError(
            f"The tokenizer's levels have the widths {widths}, which must be multiples of {base}."
        )
    if features != 2 * latent or moments not in (latent, 2 * latent):
        raise ConversionError(
            f"quant_conv of the tokenizer maps {features} channels to {moments}; with {latent} latent channels it must "
            f"map {2 * latent} to {latent} or {2 * latent}."
        )
    groups = given.get("norm_num_groups", 32)
    if groups < 1 or base % groups:
        raise ConversionError(
            f"The tokenizer's width {base} is not a multiple of norm_num_groups={groups}; correct it in "
            "original_config['tokenizer']."
        )
    attention = {
        part: [i for i in range(levels) if f"{part}.{level}.{i}.attn.0.norm.weight" in state_dict]
        for part, level in (("encoder", "down"), ("decoder", "up"))
    }
    _check_attention(given, attention, levels)
    given.agree("double_z", True)
    given.ignore("ckpt_path", "resolution", "out_ch", "give_pre_end", "resamp_with_conv")
    config = {
        "latent_channels": given.agree("embed_dim", given.agree("z_channels", latent)),
        "latent_scale": given.get("latent_scale", RELEASED_SCALE),
        "variational": given.agree("use_variational", moments == 2 * latent),
        "base_channels": given.agree("ch", base),
        "channel_multiplier": given.agree("ch_mult", [width // base for width in widths]),
        "num_res_blocks": given.agree(
            "num_res_blocks", count(state_dict, "encoder.down.0.block.{i}.conv1.weight")
        ),
        "encoder_attention_levels": attention["encoder"],
        "decoder_attention_levels": attention["decoder"],
        "norm_num_groups": groups,
        "dropout": given.get("dropout", 0.0),
        "in_channels": given.agree("in_channels", in_channels),
        "grid_size": grid_size,
    }
    given.finish()
    return KlVaeConfig(**config)


def _check_attention(given: OriginalArguments, found: dict[str, list[int]], levels: int) -> None:
    """The authors name the levels with attention by the side of their maps, counted from `resolution`."""
    resolution = given.get("resolution", 256)
    for part, at in found.items():
        name = f"{part}_attn_resolutions"
        asked = given.get(name)
        if asked is not None and [i for i in range(levels) if resolution // 2**i in asked] != at:
            given.contradiction(name, f"there is attention in the levels {at or 'none'}")


def plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    """The autoencoder alone."""
    from .modeling_kl_vae import KlVaeModel

    config = tokenizer_config(weights["tokenizer"], original_config)
    return ConversionPlan(KlVaeModel, config, {"tokenizer": TOKENIZER})


NESTINGS = (("model",),)

CONVERTER = Converter(
    family="kl_vae",
    roles={"tokenizer": TOKENIZER},
    plan=plan,
    nestings={"tokenizer": NESTINGS},
    allowed_globals=(argparse.Namespace,),
)
