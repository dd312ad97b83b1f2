"""Conversion of LlamaGen (github.com/FoundationVision/LlamaGen, arXiv 2406.06525): key map and config inference."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

from ..checkpoints import ConversionError
from ..conversion import ConversionPlan, Converter, OriginalArguments, check_codes, shape_of
from ..key_map import Drop, KeyMap, Rename, Split, StateDict, count
from ..tokenizers.llamagen_vq.convert_llamagen_vq import (
    ANY_TOKENIZER,
    NESTINGS,
    key_map,
    level_count,
    tokenizer_config,
)
from ..tokenizers.llamagen_vq.convert_llamagen_vq import plan as plan_tokenizer
from .configuration_llamagen import LlamaGenConfig

_THEIRS, _OURS = "layers.{i}", "model.layers.{i}"

TRANSFORMER = KeyMap(
    [
        Rename("cls_embedding.embedding_table.weight", "model.class_embedding.weight"),
        Rename("cls_embedding.cap_proj.fc1.weight", "model.text_projection.fc1.weight"),
        Rename("cls_embedding.cap_proj.fc2.weight", "model.text_projection.fc2.weight"),
        Rename("cls_embedding.uncond_embedding", "model.null_text_embedding"),
        Rename("tok_embeddings.weight", "model.embed_tokens.weight"),
        Split(
            f"{_THEIRS}.attention.wqkv.weight", *(f"{_OURS}.self_attn.{part}_proj.weight" for part in "qkv")
        ),
        Rename(f"{_THEIRS}.attention.wo.weight", f"{_OURS}.self_attn.o_proj.weight"),
        Rename(f"{_THEIRS}.feed_forward.w1.weight", f"{_OURS}.mlp.gate_proj.weight"),
        Rename(f"{_THEIRS}.feed_forward.w3.weight", f"{_OURS}.mlp.up_proj.weight"),
        Rename(f"{_THEIRS}.feed_forward.w2.weight", f"{_OURS}.mlp.down_proj.weight"),
        Rename(f"{_THEIRS}.attention_norm.weight", f"{_OURS}.input_layernorm.weight"),
        Rename(f"{_THEIRS}.ffn_norm.weight", f"{_OURS}.post_attention_layernorm.weight"),
        Rename("norm.weight", "model.norm.weight"),
        Rename("output.weight", "head.out_proj.weight"),
        # What the authors' model holds after it has generated.
        Drop("freqs_cis"),
        Drop("causal_mask"),
        Drop(f"{_THEIRS}.attention.kv_cache.{{leaf}}"),
    ]
)

# Width -> heads of the sizes that the authors define; the weights do not tell them.
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
DROPOUTS = {
    "token_dropout_p": ("embedding_dropout", 0.1),
    "attn_dropout_p": ("attention_dropout", 0.0),
    "resid_dropout_p": ("residual_dropout", 0.1),
    "ffn_dropout_p": ("mlp_dropout", 0.1),
    "drop_path_rate": ("drop_path_rate", 0.0),
}


def transformer_config(
    state_dict: StateDict, original_config: Mapping[str, Mapping[str, Any]], role: str = "transformer"
) -> dict[str, Any]:
    """
    The fields of [`LlamaGenConfig`], but for the tokenizer's, that the shapes of a transformer imply.

    The weights do not tell the heads and the grid: those are `n_head` and `block_size` where given, otherwise what a
    stray rotary table in the file says, otherwise the heads of the authors' size of that width and 16x16 tokens.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> constructor arguments; those of `role` are read.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    given = OriginalArguments(role, original_config.get(role))
    vocab_size, width = shape_of(state_dict, "tok_embeddings.weight", role, 2)
    condition, prefix = _condition(state_dict, given)
    mlp_width, _ = shape_of(state_dict, "layers.0.feed_forward.w1.weight", role, 2)
    _check_mlp_width(given, width, mlp_width)
    heads = _heads(state_dict, given, width)
    given.agree("n_kv_head", given.get("n_kv_head") and heads)
    given.ignore("max_batch_size", "max_seq_len", "name")
    config = {
        "vocab_size": given.agree("vocab_size", vocab_size),
        "grid_size": _grid_size(state_dict, given, prefix),
        "hidden_size": given.agree("dim", width),
        "num_hidden_layers": given.agree("n_layer", count(state_dict, "layers.{i}.attention.wqkv.weight")),
        "num_attention_heads": heads,
        "intermediate_size": mlp_width,
        "rms_norm_eps": given.get("norm_eps", 1e-5),
        "rope_theta": given.get("rope_base", 10000),
        "initializer_range": given.get("initializer_range", 0.02),
        **{ours: given.get(name, default) for name, (ours, default) in DROPOUTS.items()},
        **condition,
    }
    given.finish()
    return config


def _condition(state_dict: StateDict, given: OriginalArguments) -> tuple[dict[str, Any], int]:
    """Fields of the condition, and how many positions it takes."""
    role = given.role
    dropout = given.get("class_dropout_prob", 0.1)
    if "cls_embedding.embedding_table.weight" in state_dict:
        given.agree("model_type", "c2i")
        given.agree("cls_token_num", 1)
        given.ignore("caption_dim")
        rows, _ = shape_of(state_dict, "cls_embedding.embedding_table.weight", role, 2)
        # Without dropout there is no null class; fine-tuned without, the row is still there.
        has_null = dropout > 0 if "class_dropout_prob" in given.given else given.get("num_classes") != rows
        fields = {"condition_type": "class", "has_null_class": has_null, "condition_dropout": dropout}
        return {**fields, "num_classes": given.agree("num_classes", rows - has_null)}, 1
    given.agree("model_type", "t2i")
    given.ignore("num_classes")
    length, caption_dim = shape_of(state_dict, "cls_embedding.uncond_embedding", role, 2)
    fields = {
        "condition_type": "text",
        "condition_dropout": dropout,
        "text_embed_dim": given.agree("caption_dim", caption_dim),
        "max_prompt_tokens": given.agree("cls_token_num", length),
    }
    return fields, length


def _heads(state_dict: StateDict, given: OriginalArguments, width: int) -> int:
    if "freqs_cis" in state_dict:
        return given.agree("n_head", width // (2 * shape_of(state_dict, "freqs_cis", given.role, 3)[1]))
    heads = given.get("n_head", HEADS.get(width))
    if not heads or width % heads:
        raise ConversionError(
            f"The {given.role} is {width} wide, which is none of the authors' sizes, so its weights do not tell its heads; "
            f"give their number, a divisor of {width}, as original_config[{given.role!r}]['n_head']."
        )
    return heads


def _grid_size(state_dict: StateDict, given: OriginalArguments, prefix: int) -> int:
    if "freqs_cis" in state_dict:
        tokens = given.agree("block_size", shape_of(state_dict, "freqs_cis", given.role, 3)[0] - prefix)
    else:
        tokens = given.get("block_size", 256)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConversionError(
            f"original_config[{given.role!r}] says block_size={tokens}; it is the number of tokens of a square picture, so "
            "it must be a square number."
        )
    return side


def _check_mlp_width(given: OriginalArguments, width: int, found: int) -> None:
    """`multiple_of` and `ffn_dim_multiplier`, as far as given, must lead to the width that the weights have."""
    multiple, factor = given.get("multiple_of", 256), given.get("ffn_dim_multiplier")
    asked = int(2 * 4 * width / 3)
    asked = int(factor * asked) if factor is not None else asked
    asked = multiple * math.ceil(asked / multiple)
    named = [name for name in ("ffn_dim_multiplier", "multiple_of") if given.given.get(name) is not None]
    if named and asked != found:
        given.contradiction(named[0], f"the feed-forward blocks are {found} wide, not {asked}")


def _plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    if "transformer" not in weights:
        return plan_tokenizer(weights, original_config)
    from .modeling_llamagen import LlamaGenForImageGeneration

    fields = transformer_config(weights["transformer"], original_config)
    tokenizer = None
    key_maps = {"transformer": TRANSFORMER}
    if "tokenizer" in weights:
        tokenizer = tokenizer_config(weights["tokenizer"], original_config, fields["grid_size"])
        key_maps["tokenizer"] = key_map(level_count(weights["tokenizer"])).under("image_tokenizer.")
        check_codes(fields["vocab_size"], tokenizer.codebook_size)
    return ConversionPlan(
        model_class=LlamaGenForImageGeneration,
        config=LlamaGenConfig(image_tokenizer_config=tokenizer, **fields),
        key_maps=key_maps,
        generation={"do_sample": True, "guidance_scale": 2.0, "top_k": 0, "top_p": 1.0},
    )


CONVERTER = Converter(
    family="llamagen",
    roles={"transformer": TRANSFORMER, "tokenizer": ANY_TOKENIZER},
    plan=_plan,
    containers={"transformer_ema": {"transformer": ("ema",)}, "tokenizer_ema": {"tokenizer": ("ema",)}},
    nestings={"transformer": NESTINGS, "tokenizer": NESTINGS},
    allowed_globals=(argparse.Namespace,),
)
