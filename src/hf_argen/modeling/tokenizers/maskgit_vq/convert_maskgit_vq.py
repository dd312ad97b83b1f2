"""Conversion of MaskGIT-VQGAN as in RAR and TiTok (github.com/bytedance/1d-tokenizer): key map and config inference."""

from collections.abc import Mapping
from typing import Any

from ...checkpoints import ConversionError
from ...conversion import ConversionPlan, Converter, OriginalArguments, shape_of
from ...key_map import KeyMap, Rename, Rule, StateDict, count
from .configuration_maskgit_vq import MaskGitVQConfig


def _resnet(theirs: str, ours: str) -> list[Rule]:
    parts = {
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "nin_shortcut": "shortcut",
    }
    return [Rename(f"{theirs}.{part}.{{leaf}}", f"{ours}.{own}.{{leaf}}") for part, own in parts.items()]


def part(name: str, levels: str, own_levels: str) -> list[Rule]:
    """Encoder or decoder."""
    return [
        *(
            Rename(f"{name}.{one}.{{leaf}}", f"{name}.{one}.{{leaf}}")
            for one in ("conv_in", "norm_out", "conv_out")
        ),
        *_resnet(f"{name}.mid.{{j}}", f"{name}.mid_block.resnets.{{j}}"),
        *_resnet(f"{name}.{levels}.{{i}}.block.{{j}}", f"{name}.{own_levels}.{{i}}.resnets.{{j}}"),
    ]


TOKENIZER = KeyMap(
    [
        *part("encoder", "down", "down_blocks"),
        *part("decoder", "up", "up_blocks"),
        Rename("decoder.up.{i}.upsample_conv.{leaf}", "decoder.up_blocks.{i}.upsample.{leaf}"),
        Rename("quantize.embedding.weight", "quantizer.embedding.weight"),
    ]
)


def tokenizer_config(
    state_dict: StateDict,
    original_config: Mapping[str, Mapping[str, Any]],
    grid_size: int | list[int] | None = None,
) -> MaskGitVQConfig:
    """
    The configuration that the shapes of a tokenizer imply.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> the constants that the authors' class has written into it; those of `tokenizer` are read.
        grid_size: token grid of the transformer; `None` for pictures of any size.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    role = "tokenizer"
    given = OriginalArguments(role, original_config.get(role))
    codebook_size, codebook_dim = shape_of(state_dict, "quantize.embedding.weight", role, 2)
    base, in_channels, *_ = shape_of(state_dict, "encoder.conv_in.weight", role, 4)
    levels = count(state_dict, "encoder.down.{i}.block.0.conv1.weight")
    blocks = count(state_dict, "encoder.mid.{i}.conv1.weight")
    if levels == 0 or blocks == 0:
        raise ConversionError(
            "The tokenizer has no encoder.down or encoder.mid; the file is incomplete or of another family."
        )
    widths = [
        shape_of(state_dict, f"encoder.down.{i}.block.0.conv1.weight", role, 4)[0] for i in range(levels)
    ]
    if any(width % base for width in widths):
        raise ConversionError(f"The levels have the widths {widths}, which must be multiples of {base}.")
    given.agree("num_resolutions", levels)
    given.agree("z_channels", codebook_dim)
    given.ignore("resolution")
    config = {
        "codebook_size": given.agree("num_embeddings", codebook_size),
        "codebook_dim": given.agree("embedding_dim", codebook_dim),
        "base_channels": given.agree("hidden_channels", base),
        "channel_multiplier": given.agree("channel_mult", [width // base for width in widths]),
        "num_res_blocks": given.agree("num_res_blocks", blocks),
        "dropout": given.get("dropout", 0.0),
        "in_channels": given.agree("num_channels", in_channels),
        "grid_size": grid_size,
        "codebook_loss_weight": given.get("commitment_cost", 0.25),  # their name for it
    }
    given.finish()
    return MaskGitVQConfig(**config)


def plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    """The tokenizer alone."""
    from .modeling_maskgit_vq import MaskGitVQModel

    config = tokenizer_config(weights["tokenizer"], original_config)
    return ConversionPlan(MaskGitVQModel, config, {"tokenizer": TOKENIZER})


CONVERTER = Converter(family="maskgit_vq", roles={"tokenizer": TOKENIZER}, plan=plan)
