"""Conversion of LlamaGen's VQ tokenizer (github.com/FoundationVision/LlamaGen): key map and config inference."""

import argparse
from collections.abc import Mapping
from typing import Any

from ...checkpoints import ConversionError
from ...conversion import ConversionPlan, Converter, OriginalArguments, shape_of
from ...key_map import Drop, KeyMap, Rename, Rule, StateDict, count
from ..key_rules import attention, resnet
from .configuration_llamagen_vq import LlamaGenVQConfig

# Where the authors' trainers put the weights, in the order in which their scripts look.
NESTINGS = (("model",), ("module",), ("state_dict",))


def _level(theirs: str, ours: str, resampling: str) -> list[Rule]:
    return [
        *resnet(f"{theirs}.res.{{j}}", f"{ours}.resnets.{{j}}"),
        *attention(f"{theirs}.attn.{{j}}", f"{ours}.attentions.{{j}}"),
        Rename(f"{theirs}.{resampling}.conv.{{leaf}}", f"{ours}.{resampling}.{{leaf}}"),
    ]


def _ends(name: str) -> list[Rule]:
    """What encoder and decoder both have around their levels."""
    return [
        Rename(f"{name}.conv_in.{{leaf}}", f"{name}.conv_in.{{leaf}}"),
        *resnet(f"{name}.mid.0", f"{name}.mid_block.resnet_1"),
        *attention(f"{name}.mid.1", f"{name}.mid_block.attention"),
        *resnet(f"{name}.mid.2", f"{name}.mid_block.resnet_2"),
        Rename(f"{name}.norm_out.{{leaf}}", f"{name}.norm_out.{{leaf}}"),
        Rename(f"{name}.conv_out.{{leaf}}", f"{name}.conv_out.{{leaf}}"),
    ]


def key_map(levels: int) -> KeyMap:
    """The keys of a tokenizer of so many levels; the authors count those of the decoder from the lowest resolution."""
    rules = _ends("encoder") + _ends("decoder")
    rules += _level("encoder.conv_blocks.{i}", "encoder.down_blocks.{i}", "downsample")
    for i in range(levels):
        rules += _level(f"decoder.conv_blocks.{levels - 1 - i}", f"decoder.up_blocks.{i}", "upsample")
    return KeyMap(
        [
            *rules,
            Rename("quant_conv.{leaf}", "quant_conv.{leaf}"),
            Rename("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
            Rename("quantize.embedding.weight", "quantizer.embedding.weight"),
            Drop("quantize.codebook_used"),
        ]
    )


ANY_TOKENIZER = key_map(10)


def level_count(state_dict: StateDict) -> int:
    """Levels of the encoder."""
    return count(state_dict, "encoder.conv_blocks.{i}.res.0.conv1.weight")


def tokenizer_config(
    state_dict: StateDict,
    original_config: Mapping[str, Mapping[str, Any]],
    grid_size: int | list[int] | None = None,
) -> LlamaGenVQConfig:
    """
    The configuration that the shapes of a tokenizer imply.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> constructor arguments; those of `tokenizer` are read, with `ch` and `num_res_blocks` of
            the authors' encoder and decoder classes.
        grid_size: token grid of the transformer; `None` for pictures of any size.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    role = "tokenizer"
    given = OriginalArguments(role, original_config.get(role))
    codebook_size, codebook_dim = shape_of(state_dict, "quantize.embedding.weight", role, 2)
    base, in_channels, *_ = shape_of(state_dict, "encoder.conv_in.weight", role, 4)
    levels = level_count(state_dict)
    last = range(count(state_dict, "encoder.conv_blocks.0.res.{i}.conv1.weight"))[-1:]
    if levels == 0 or not last:
        raise ConversionError(
            "The tokenizer has no encoder.conv_blocks; the file is incomplete or of another family."
        )
    multipliers = {}
    for name, order in (("encoder", range(levels)), ("decoder", reversed(range(levels)))):
        widths = [
            shape_of(state_dict, f"{name}.conv_blocks.{i}.res.0.conv1.weight", role, 4)[0] for i in order
        ]
        if any(width % base for width in widths):
            raise ConversionError(
                f"The {name}'s levels have the widths {widths}, which must be multiples of {base}."
            )
        multipliers[name] = given.agree(f"{name}_ch_mult", [width // base for width in widths])
    given.ignore("codebook_show_usage", "name")
    config = {
        "codebook_size": given.agree("codebook_size", codebook_size),
        "codebook_dim": given.agree("codebook_embed_dim", codebook_dim),
        "normalize_codes": given.get("codebook_l2_norm", True),
        "latent_channels": given.agree("z_channels", shape_of(state_dict, "quant_conv.weight", role, 4)[1]),
        "base_channels": given.agree("ch", base),
        "channel_multiplier": multipliers["encoder"],
        "decoder_channel_multiplier": multipliers["decoder"],
        "num_res_blocks": given.agree("num_res_blocks", last[0] + 1),
        "dropout": given.get("dropout_p", 0.0),
        "in_channels": in_channels,
        "grid_size": grid_size,
        "commitment_loss_weight": given.get("commit_loss_beta", 0.25),
        "entropy_loss_weight": given.get("entropy_loss_ratio", 0.0),
    }
    given.finish()
    return LlamaGenVQConfig(**config)


def plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    """The tokenizer alone."""
    from .modeling_llamagen_vq import LlamaGenVQModel

    state_dict = weights["tokenizer"]
    config = tokenizer_config(state_dict, original_config)
    return ConversionPlan(LlamaGenVQModel, config, {"tokenizer": key_map(level_count(state_dict))})


CONVERTER = Converter(
    family="llamagen_vq",
    roles={"tokenizer": ANY_TOKENIZER},
    plan=plan,
    containers={"tokenizer_ema": {"tokenizer": ("ema",)}},
    nestings={"tokenizer": NESTINGS},
    allowed_globals=(argparse.Namespace,),
)
