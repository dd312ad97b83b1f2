"""Conversion of TiTok's tokenizers (github.com/bytedance/1d-tokenizer, arXiv 2406.07550): key map and config inference."""

import math
from collections.abc import Mapping
from typing import Any

from ...checkpoints import ConversionError
from ...conversion import ConversionPlan, Converter, OriginalArguments, shape_of
from ...key_map import KeyMap, Rename, Rule, Split, StateDict, Transposed, Unbatched, count
from ..maskgit_vq.configuration_maskgit_vq import MaskGitVQConfig
from ..maskgit_vq.convert_maskgit_vq import part as maskgit_part
from .configuration_titok import TitokConfig

RELEASED_HEADS = {512: 8, 768: 12, 1024: 16}  # attention heads by width, which the weights do not tell
NAMED_HEADS = {
    "small": 8,
    "base": 12,
    "large": 16,
    "tiny": 4,
    "mini": 3,
}  # by size; the last two are of our reference cases
ROLE = "tokenizer"


def _transformer(name: str) -> list[Rule]:
    theirs, ours = f"{name}.transformer.{{i}}", f"{name}.layers.{{i}}"
    return [
        Rename(f"{name}.class_embedding", f"{name}.class_embedding.weight"),
        Rename(f"{name}.positional_embedding", f"{name}.position_embedding.weight"),
        Rename(f"{name}.latent_token_positional_embedding", f"{name}.latent_position_embedding.weight"),
        Rename(f"{name}.ln_pre.{{leaf}}", f"{name}.norm_in.{{leaf}}"),
        Rename(f"{name}.ln_post.{{leaf}}", f"{name}.norm_out.{{leaf}}"),
        Rename(f"{theirs}.ln_1.{{leaf}}", f"{ours}.input_layernorm.{{leaf}}"),
        *(
            Split(f"{theirs}.attn.in_proj_{leaf}", *(f"{ours}.self_attn.{one}_proj.{leaf}" for one in "qkv"))
            for leaf in ("weight", "bias")
        ),
        Rename(f"{theirs}.attn.out_proj.{{leaf}}", f"{ours}.self_attn.o_proj.{{leaf}}"),
        Rename(f"{theirs}.ln_2.{{leaf}}", f"{ours}.post_attention_layernorm.{{leaf}}"),
        Rename(f"{theirs}.mlp.c_fc.{{leaf}}", f"{ours}.mlp.fc1.{{leaf}}"),
        Rename(f"{theirs}.mlp.c_proj.{{leaf}}", f"{ours}.mlp.fc2.{{leaf}}"),
    ]


def key_map(legacy: bool) -> KeyMap:
    """The keys of a tokenizer; the ends of the decoder differ between the first release and the later ones."""
    if legacy:
        ends = [
            Rename("decoder.ffn.0.{leaf}", "code_conv_1.{leaf}"),
            Rename("decoder.ffn.2.{leaf}", "code_conv_2.{leaf}"),
            Transposed("pixel_quantize.embedding.weight", "pixel_embedding.weight"),
            *maskgit_part("pixel_decoder", "up", "up_blocks"),
            Rename(
                "pixel_decoder.up.{i}.upsample_conv.{leaf}", "pixel_decoder.up_blocks.{i}.upsample.{leaf}"
            ),
        ]
    else:
        ends = [
            Rename("decoder.ffn.0.{leaf}", "patch_conv.{leaf}"),
            Rename("decoder.conv_out.{leaf}", "pixel_conv.{leaf}"),
        ]
    return KeyMap(
        [
            Rename("latent_tokens", "latent_embedding.weight"),
            Rename("encoder.patch_embed.{leaf}", "patch_embedding.{leaf}"),
            Rename("encoder.conv_out.{leaf}", "quant_conv.{leaf}"),
            Rename("quantize.embedding.weight", "quantizer.embedding.weight"),
            Rename("decoder.decoder_embed.{leaf}", "post_quant_proj.{leaf}"),
            Unbatched("decoder.mask_token", "mask_embedding.weight"),
            *_transformer("encoder"),
            *_transformer("decoder"),
            *ends,
        ]
    )


LEGACY, LATER = key_map(True), key_map(False)
ANY_TOKENIZER = KeyMap({rule.source: rule for rule in (*LATER.rules, *LEGACY.rules)}.values())


def is_legacy(state_dict: StateDict) -> bool:
    """Whether a tokenizer is of the first release."""
    return "decoder.conv_out.weight" not in state_dict


def tokenizer_config(state_dict: StateDict, original_config: Mapping[str, Mapping[str, Any]]) -> TitokConfig:
    """
    The configuration that the shapes of a tokenizer imply.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> the authors' configuration, with the blocks `model.vq_model` and `dataset.preprocessing`;
            that of `tokenizer` is read, and of `pixel_tokenizer` the constants of the pixel decoder. The weights do not tell
            the attention heads, which may be given as `vit_enc_num_heads` and `vit_dec_num_heads`.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    given = OriginalArguments(ROLE, _flat(original_config.get(ROLE)))
    latent_tokens, width = shape_of(state_dict, "latent_tokens", ROLE, 2)
    _, in_channels, patch, _ = shape_of(state_dict, "encoder.patch_embed.weight", ROLE, 4)
    decoder_width, channels = shape_of(state_dict, "decoder.decoder_embed.weight", ROLE, 2)
    moments = shape_of(state_dict, "encoder.conv_out.weight", ROLE, 4)[0]
    side = _side(state_dict, "encoder")
    decoder_side = _side(state_dict, "decoder")
    image_size = side * patch
    legacy, is_vq = is_legacy(state_dict), "quantize.embedding.weight" in state_dict
    if image_size % decoder_side or moments != channels * (1 if is_vq else 2):
        raise ConversionError(
            f"The tokenizer encodes to {moments} channels and decodes {channels}, {image_size} pixels a side from "
            f"{decoder_side} patches, which do not belong together; the file is damaged or of another family."
        )
    given.agree("is_legacy", legacy)
    given.agree("finetune_decoder", legacy)
    given.agree("quantize_mode", "vq" if is_vq else "vae")
    given.agree("crop_size", image_size)
    given.agree("vit_enc_patch_size", patch)
    given.agree("vit_dec_patch_size", image_size // decoder_side)
    given.ignore("pretrained_tokenizer_weight", "clustering_vq")
    codes = shape_of(state_dict, "quantize.embedding.weight", ROLE, 2)[0] if is_vq else 4096
    config = {
        "image_size": image_size,
        "patch_size": patch,
        "decoder_patch_size": image_size // decoder_side,
        "num_latent_tokens": given.agree("num_latent_tokens", latent_tokens),
        "latent_channels": given.agree("token_size", channels),
        "quantization": "vq" if is_vq else "vae",
        "codebook_size": given.agree("codebook_size", codes) if is_vq else codes,
        "normalize_codes": given.get("use_l2_norm", legacy),
        "legacy": legacy,
        "pixel_decoder_config": pixel_decoder_config(state_dict, original_config) if legacy else None,
        "in_channels": in_channels,
        "commitment_loss_weight": given.get("commitment_cost", 0.25),
    }
    for name, prefix, size, short in (
        ("encoder", "", width, "enc"),
        ("decoder", "decoder_", decoder_width, "dec"),
    ):
        config |= {
            f"{prefix}hidden_size": size,
            f"{prefix}num_hidden_layers": count(state_dict, f"{name}.transformer.{{i}}.ln_1.weight"),
            f"{prefix}num_attention_heads": _heads(given, short, size),
            f"{prefix}intermediate_size": shape_of(
                state_dict, f"{name}.transformer.0.mlp.c_fc.weight", ROLE, 2
            )[0],
        }
    given.finish()
    return TitokConfig(**config)


def _flat(given: Any) -> Any:
    """The arguments of the authors' nested blocks in one dict; those that say nothing about a tokenizer are left out."""
    if not isinstance(given, Mapping):
        return given
    model, dataset = given.get("model", {}), given.get("dataset", {})
    if not isinstance(model, Mapping) or not isinstance(dataset, Mapping):
        raise ConversionError(f"original_config[{ROLE!r}] must hold the blocks model and dataset as dicts.")
    own = {key: value for key, value in given.items() if key not in ("model", "dataset")}
    return {**own, **model.get("vq_model", {}), **dataset.get("preprocessing", {})}


def _side(state_dict: StateDict, name: str) -> int:
    patches = shape_of(state_dict, f"{name}.positional_embedding", ROLE, 2)[0] - 1
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise ConversionError(f"The {name} has {patches} patches, which are no square picture.")
    return side


def _heads(given: OriginalArguments, part: str, width: int) -> int:
    """As given, or those of the named size, or of the released size of this width."""
    name, size = f"vit_{part}_num_heads", given.get(f"vit_{part}_model_size")
    heads = given.get(name, NAMED_HEADS.get(size, RELEASED_HEADS.get(width)))
    if heads is None:
        raise ConversionError(
            f"The weights of the tokenizer do not tell its attention heads; give original_config['tokenizer']['{name}']."
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConversionError(
            f"original_config['tokenizer'] says {name}={heads!r}, which does not divide the width {width}."
        )
    return heads


def pixel_decoder_config(
    state_dict: StateDict, original_config: Mapping[str, Mapping[str, Any]]
) -> MaskGitVQConfig:
    """The configuration of the tokenizer whose decoder draws the pictures."""
    given = OriginalArguments("pixel_tokenizer", original_config.get("pixel_tokenizer"))
    codes, dim = shape_of(state_dict, "pixel_quantize.embedding.weight", ROLE, 2)
    out_channels, base, *_ = shape_of(state_dict, "pixel_decoder.conv_out.weight", ROLE, 4)
    levels = count(state_dict, "pixel_decoder.up.{i}.block.0.conv1.weight")
    widths = [
        shape_of(state_dict, f"pixel_decoder.up.{i}.block.0.conv1.weight", ROLE, 4)[0] for i in range(levels)
    ]
    hidden = given.get("hidden_channels", widths[0] if widths else base)
    if not widths or any(width % hidden for width in widths):
        raise ConversionError(
            f"The pixel decoder's levels have the widths {widths}, which must be multiples of {hidden}."
        )
    given.agree("num_resolutions", levels)
    given.agree("z_channels", dim)
    given.ignore("resolution", "dropout")
    config = MaskGitVQConfig(
        codebook_size=given.agree("num_embeddings", codes),
        codebook_dim=dim,
        base_channels=hidden,
        channel_multiplier=given.agree("channel_mult", [width // hidden for width in widths]),
        num_res_blocks=given.agree("num_res_blocks", count(state_dict, "pixel_decoder.mid.{i}.conv1.weight")),
        in_channels=given.agree("num_channels", out_channels),
    )
    given.finish()
    return config


def plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    """The tokenizer."""
    from .modeling_titok import TitokModel

    config = tokenizer_config(weights[ROLE], original_config)
    return ConversionPlan(TitokModel, config, {ROLE: LEGACY if config.legacy else LATER})


CONVERTER = Converter(
    family="titok",
    roles={ROLE: ANY_TOKENIZER},
    plan=plan,
    config_roles=("pixel_tokenizer",),
    hub_roles=(ROLE,),
)
