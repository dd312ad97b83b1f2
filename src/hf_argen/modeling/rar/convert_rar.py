"""Conversion of RAR (github.com/bytedance/1d-tokenizer, arXiv 2411.00776): key map and config inference."""

import math
from collections.abc import Mapping
from typing import Any

from ..checkpoints import ConversionError
from ..conversion import ConversionPlan, Converter, OriginalArguments, check_codes, shape_of
from ..key_map import KeyMap, Rename, Reshape, Rows, StateDict, count
from ..key_rules import timm_block
from ..tokenizers.maskgit_vq.convert_maskgit_vq import TOKENIZER, tokenizer_config
from ..tokenizers.maskgit_vq.convert_maskgit_vq import plan as plan_tokenizer
from .configuration_rar import RarConfig

_THEIRS, _OURS = "blocks.{i}", "model.layers.{i}"
PREFIX = 2  # positions before the first image token
SPARE_POSITIONS, SPARE_STEPS = 1024, 100  # rows of the authors' tables beyond the tokens of a picture


def key_map(codes: int, classes: int, tokens: int) -> KeyMap:
    """
    The keys of a transformer. The one table of the authors holds the codes, a mask token that nothing uses, the classes and
    the null class; their tables of positions are longer than any sequence.

    Args:
        codes: of the tokenizer.
        classes: without the null class.
        tokens: of a picture.
    """
    positions, spare = tokens + SPARE_POSITIONS, tokens + SPARE_STEPS
    length = PREFIX + tokens
    return KeyMap(
        [
            Rows(
                "embeddings.weight",
                codes + classes + 2,
                {
                    "model.embed_tokens.weight": (0, codes),
                    "model.class_embedding.weight": (codes + 1, codes + classes + 2),
                },
            ),
            Reshape("cls_token", "model.cls_embedding.weight", ours=(1, -1), theirs=(1, 1, -1)),
            Rows("pos_embed", positions, {"model.position_embedding.weight": (0, length)}, is_batched=True),
            Rows(
                "target_aware_pos_embed",
                positions,
                {"model.target_position_embedding.weight": (PREFIX, length)},
                is_batched=True,
            ),
            Rows(
                "timesteps_embeddings", spare, {"model.step_embedding.weight": (0, length)}, is_batched=True
            ),
            *timm_block(_THEIRS, _OURS),
            Rename(f"{_THEIRS}.attn.q_norm.{{leaf}}", f"{_OURS}.self_attn.q_norm.{{leaf}}"),
            Rename(f"{_THEIRS}.attn.k_norm.{{leaf}}", f"{_OURS}.self_attn.k_norm.{{leaf}}"),
            Rename(f"{_THEIRS}.adaLN_modulation.1.{{leaf}}", f"{_OURS}.modulation.linear.{{leaf}}"),
            Rename("adaln_before_head.adaLN_modulation.1.{leaf}", "model.norm.linear.{leaf}"),
            Rename("lm_head.{leaf}", "head.out_proj.{leaf}"),
        ]
    )


RELEASED = key_map(codes=1024, classes=1000, tokens=256)


def transformer_config(
    state_dict: StateDict, original_config: Mapping[str, Mapping[str, Any]], role: str = "transformer"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The fields of [`RarConfig`], but for the tokenizer's, that the shapes of a transformer imply; and the sampling options
    that the authors' configuration holds.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> block `model` of the authors' configuration, with `vq_model` and `generator` in it.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    given = OriginalArguments(role, _flat(original_config.get(role), role))
    vocab_size, width = shape_of(state_dict, "lm_head.weight", role, 2)
    rows, _ = shape_of(state_dict, "embeddings.weight", role, 2)
    tokens = shape_of(state_dict, "pos_embed", role, 3)[1] - SPARE_POSITIONS
    mlp_width, _ = shape_of(state_dict, "blocks.0.mlp.fc1.weight", role, 2)
    (head_dim,) = shape_of(state_dict, "blocks.0.attn.q_norm.weight", role, 1)
    classes = rows - vocab_size - 2
    if tokens < 1 or classes < 1 or width % head_dim:
        raise ConversionError(
            f"The {role} has {rows} embeddings for {vocab_size} codes, tables for {tokens} tokens and heads of "
            f"{head_dim} in a width of {width}, which do not belong together; the file is damaged or of another family."
        )
    asked_width = given.get("intermediate_size", mlp_width)
    if int(width * (asked_width / width)) != mlp_width:
        given.contradiction("intermediate_size", mlp_width)
    given.agree("num_latent_tokens", given.get("num_latent_tokens") and tokens)
    given.ignore("token_size", "finetune_decoder", "pretrained_tokenizer_weight", "use_checkpoint")
    given.ignore("randomness_anneal_start", "randomness_anneal_end")
    config = {
        "vocab_size": given.agree("codebook_size", vocab_size),
        "grid_size": _side(given.agree("image_seq_len", tokens), role),
        "hidden_size": given.agree("hidden_size", width),
        "num_hidden_layers": given.agree(
            "num_hidden_layers", count(state_dict, "blocks.{i}.attn.proj.weight")
        ),
        "num_attention_heads": given.agree("num_attention_heads", width // head_dim),
        "intermediate_size": mlp_width,
        "hidden_dropout": given.get("dropout", 0.1),
        "attention_dropout": given.get("attn_drop", 0.1),
        "num_classes": given.agree("condition_num_classes", classes),
        "condition_dropout": given.get("class_label_dropout", 0.1),
    }
    generation = {
        "do_sample": True,
        "temperature": given.get("randomize_temperature", 1.0),
        "guidance_scale": given.get("guidance_scale", 4.0),
        "guidance_schedule": {"type": "power_cosine", "power": given.get("guidance_scale_pow", 0.0)},
        "top_k": 0,
        "top_p": 1.0,
    }
    given.finish()
    return config, generation


def _flat(given: Any, role: str) -> Any:
    """The arguments of the two inner blocks and those beside them, which have no names in common."""
    if not isinstance(given, Mapping):
        return given
    flat = dict(given)
    for name in ("vq_model", "generator"):
        block = flat.pop(name, {})
        if not isinstance(block, Mapping):
            raise ConversionError(
                f"original_config[{role!r}][{name!r}] must be a dict of arguments, not {block!r}."
            )
        flat |= block
    return flat


def _side(tokens: int, role: str) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConversionError(f"The {role} draws {tokens} tokens, which are no square picture.")
    return side


def _plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    if "transformer" not in weights:
        return plan_tokenizer(weights, original_config)
    from .modeling_rar import RarForImageGeneration

    fields, generation = transformer_config(weights["transformer"], original_config)
    key_maps = {"transformer": key_map(fields["vocab_size"], fields["num_classes"], fields["grid_size"] ** 2)}
    tokenizer = None
    if "tokenizer" in weights:
        tokenizer = tokenizer_config(weights["tokenizer"], original_config, fields["grid_size"])
        key_maps["tokenizer"] = TOKENIZER.under("image_tokenizer.")
        check_codes(fields["vocab_size"], tokenizer.codebook_size)
    return ConversionPlan(
        model_class=RarForImageGeneration,
        config=RarConfig(image_tokenizer_config=tokenizer, **fields),
        key_maps=key_maps,
        generation=generation,
    )


CONVERTER = Converter(
    family="rar",
    roles={"transformer": RELEASED, "tokenizer": TOKENIZER},
    plan=_plan,
    config_roles=("experiment",),
)
