"""
Conversion of TiTok's generators, ImageBert and UViT-Bert (github.com/bytedance/1d-tokenizer, arXiv 2406.07550): key map and
config inference.
"""

from collections.abc import Mapping
from typing import Any

from ..checkpoints import ConversionError
from ..conversion import ConversionPlan, Converter, OriginalArguments, check_codes, shape_of
from ..key_map import Drop, KeyMap, Rename, Rows, Rule, StateDict, Unbatched, count
from ..key_rules import timm_block
from ..tokenizers.titok.configuration_titok import TitokConfig
from ..tokenizers.titok.convert_titok import ANY_TOKENIZER, LATER, LEGACY, tokenizer_config
from ..tokenizers.titok.convert_titok import plan as plan_tokenizer
from .configuration_maskgit import MaskGitConfig

ROLE = "generator"
TYPES = {"ViT": "bert", "UViT": "uvit"}  # the authors' names of the two forms
RELEASED_HEADS = 16  # attention heads, which the weights do not tell
_ENCODER = "model.encoder.layer.{i}"


def _bert_rules(table: Rule) -> list[Rule]:
    ours = "model.layers.{i}"
    return [
        table,
        Rename("model.embeddings.position_embeddings.weight", "model.position_embedding.weight"),
        Rows(
            "model.embeddings.token_type_embeddings.weight", 2, {"model.token_type_embedding.weight": (0, 1)}
        ),
        Drop("model.embeddings.position_ids"),  # of older releases of transformers
        Rename("model.embeddings.LayerNorm.{leaf}", "model.embed_norm.{leaf}"),
        *(
            Rename(f"{_ENCODER}.attention.self.{name}.{{leaf}}", f"{ours}.self_attn.{name[0]}_proj.{{leaf}}")
            for name in ("query", "key", "value")
        ),
        Rename(f"{_ENCODER}.attention.output.dense.{{leaf}}", f"{ours}.self_attn.o_proj.{{leaf}}"),
        Rename(
            f"{_ENCODER}.attention.output.LayerNorm.{{leaf}}", f"{ours}.post_attention_layernorm.{{leaf}}"
        ),
        Rename(f"{_ENCODER}.intermediate.dense.{{leaf}}", f"{ours}.mlp.fc1.{{leaf}}"),
        Rename(f"{_ENCODER}.output.dense.{{leaf}}", f"{ours}.mlp.fc2.{{leaf}}"),
        Rename(f"{_ENCODER}.output.LayerNorm.{{leaf}}", f"{ours}.output_layernorm.{{leaf}}"),
        Rename("model.lm_head.{leaf}", "head.out_proj.{leaf}"),
    ]


def _uvit_rules(table: Rule) -> list[Rule]:
    rules: list[Rule] = [
        table,
        Unbatched("pos_embed", "model.position_embedding.weight"),
        Rename("norm.{leaf}", "model.norm.{leaf}"),
        Rename("lm_head.{leaf}", "head.out_proj.{leaf}"),
        Rename("out_blocks.{i}.skip_linear.{leaf}", "model.out_layers.{i}.skip_proj.{leaf}"),
    ]
    for theirs, ours in (
        ("in_blocks.{i}", "model.in_layers.{i}"),
        ("mid_block", "model.mid_layer"),
        ("out_blocks.{i}", "model.out_layers.{i}"),
    ):
        rules += timm_block(theirs, ours, qkv="weight")
    return rules


def key_map(architecture: str, codes: int, classes: int) -> KeyMap:
    """
    The keys of a generator. The one table of the authors holds the codes, the mask token, the classes and the null class.

    Args:
        architecture: "bert" or "uvit".
        codes: of the tokenizer.
        classes: without the null class.
    """
    is_bert = architecture == "bert"
    ranges = {
        "model.embed_tokens.weight": (0, codes),
        "model.mask_embedding.weight": (codes, codes + 1),
        "model.class_embedding.weight": (codes + 1, codes + classes + 2),
    }
    name = "model.embeddings.word_embeddings.weight" if is_bert else "embeddings.weight"
    table = Rows(name, codes + classes + 2, ranges)
    return KeyMap(_bert_rules(table) if is_bert else _uvit_rules(table))


RELEASED = {name: key_map(name, codes=4096, classes=1000) for name in TYPES.values()}
ANY_GENERATOR = KeyMap(rule for name in TYPES.values() for rule in RELEASED[name].rules)


def generator_config(
    state_dict: StateDict, original_config: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The fields of [`MaskGitConfig`], but for the tokenizer's, that the shapes of a generator imply; and the sampling options
    that the authors' configuration holds.

    Args:
        state_dict: the authors' tensors.
        original_config: role -> the authors' configuration; of `generator` the blocks `model` and `losses` are read.

    Raises:
        ConversionError: the arguments contradict the weights.
    """
    given = OriginalArguments(ROLE, _flat(original_config.get(ROLE)))
    is_bert = "pos_embed" not in state_dict
    prefix = "model." if is_bert else ""
    table = "model.embeddings.word_embeddings.weight" if is_bert else "embeddings.weight"
    codes, width = shape_of(state_dict, f"{prefix}lm_head.weight", ROLE, 2)
    rows, _ = shape_of(state_dict, table, ROLE, 2)
    if is_bert:
        positions = shape_of(state_dict, "model.embeddings.position_embeddings.weight", ROLE, 2)[0]
        inner = shape_of(state_dict, f"{_ENCODER.format(i=0)}.intermediate.dense.weight", ROLE, 2)[0]
        depth = count(state_dict, f"{_ENCODER}.intermediate.dense.weight")
    else:
        positions = shape_of(state_dict, "pos_embed", ROLE, 3)[1]
        inner = shape_of(state_dict, "mid_block.mlp.fc1.weight", ROLE, 2)[0]
        depth = 2 * count(state_dict, "in_blocks.{i}.norm1.weight")
    if rows < codes + 3 or positions < 2:
        raise ConversionError(
            f"The {ROLE} has {rows} embeddings for {codes} codes and {positions} positions, which do not belong together; the "
            "file is damaged or of another family."
        )
    asked = given.get("num_hidden_layers", depth)
    if asked not in ((depth,) if is_bert else (depth, depth + 1)):  # the authors round down to an even number
        given.contradiction("num_hidden_layers", depth)
    given.agree(
        "model_type", next(name for name, ours in TYPES.items() if ours == ("bert" if is_bert else "uvit"))
    )
    given.agree("num_latent_tokens", positions - 1)
    # The authors' U-ViT is built without its dropouts.
    dropouts = {"hidden_dropout": given.get("dropout", 0.1), "attention_dropout": given.get("attn_drop", 0.1)}
    config = {
        "architecture": "bert" if is_bert else "uvit",
        "vocab_size": given.agree("codebook_size", codes),
        "num_image_tokens": given.agree("image_seq_len", positions - 1),
        "hidden_size": given.agree("hidden_size", width),
        "num_hidden_layers": depth,
        "num_attention_heads": _heads(given, width),
        "intermediate_size": given.agree("intermediate_size", inner),
        **(dropouts if is_bert else dict.fromkeys(dropouts, 0.0)),
        "label_smoothing": given.get("label_smoothing", 0.1),
        "known_token_weight": given.get("loss_weight_unmasked_token", 0.1),
        "num_classes": given.agree("condition_num_classes", rows - codes - 2),
        "condition_dropout": given.get("class_label_dropout", 0.1),
    }
    generation = _sampling(given, positions - 1)
    given.finish()
    return config, generation


def _sampling(given: OriginalArguments, tokens: int) -> dict[str, Any]:
    """The recipe of the authors' benchmark, in whose script the softmax temperature falls."""
    decay = given.get("guidance_decay", "constant")
    schedules = {
        "constant": "constant",
        "linear": "linear",
        "power-cosine": {"type": "power_cosine", "power": given.get("guidance_scale_pow", 3.0)},
    }
    if decay not in schedules:
        raise ConversionError(
            f"original_config[{ROLE!r}] says guidance_decay={decay!r}; known are {', '.join(schedules)}."
        )
    steps = given.get("num_steps", 8)
    return {
        "do_sample": True,
        "temperature": 1.0,
        "guidance_scale": given.get("guidance_scale", 3.0),
        "guidance_schedule": schedules[decay],
        "top_k": 0,
        "top_p": 1.0,
        "decoding": {
            "type": "masked",
            "num_steps": min(steps, tokens),
            "order": "confidence",
            "schedule": "arccos",
            "randomize_temperature": given.get("randomize_temperature", 4.5),
            "softmax_temperature_annealing": True,
        },
    }


def _flat(given: Any) -> Any:
    """The arguments of the authors' nested blocks in one dict; those that say nothing about a generator are left out."""
    if not isinstance(given, Mapping):
        return given
    outer = {name: given.get(name, {}) for name in ("model", "losses", "dataset", "experiment")}
    model = outer["model"] if isinstance(outer["model"], Mapping) else {}
    inner = {name: model.get(name, {}) for name in ("vq_model", "generator")}
    for name, block in {**outer, **inner}.items():
        if not isinstance(block, Mapping):
            raise ConversionError(
                f"original_config[{ROLE!r}] must hold the block {name} as a dict, not {block!r}."
            )
    shared = {
        key: inner["vq_model"][key]
        for key in ("codebook_size", "num_latent_tokens")
        if key in inner["vq_model"]
    }
    losses = {
        key: outer["losses"][key]
        for key in ("label_smoothing", "loss_weight_unmasked_token")
        if key in outer["losses"]
    }
    own = {key: value for key, value in given.items() if key not in outer}
    return {**own, **shared, **losses, **inner["generator"]}


def _heads(given: OriginalArguments, width: int) -> int:
    heads = given.get("num_attention_heads", RELEASED_HEADS)
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConversionError(
            f"The {ROLE} has num_attention_heads={heads!r}, which does not divide its width {width}; give "
            f"original_config[{ROLE!r}]['model']['generator']['num_attention_heads']."
        )
    return heads


def _plan(weights: dict[str, StateDict], original_config: Mapping[str, Mapping[str, Any]]) -> ConversionPlan:
    if ROLE not in weights:
        return plan_tokenizer(weights, original_config)
    from .modeling_maskgit import MaskGitForImageGeneration

    fields, generation = generator_config(weights[ROLE], original_config)
    key_maps = {ROLE: key_map(fields["architecture"], fields["vocab_size"], fields["num_classes"])}
    tokenizer = None
    if "tokenizer" in weights:
        tokenizer = tokenizer_config(weights["tokenizer"], original_config)
        key_maps["tokenizer"] = (LEGACY if tokenizer.legacy else LATER).under("image_tokenizer.")
        _check_same_tokens(fields, tokenizer)
    return ConversionPlan(
        model_class=MaskGitForImageGeneration,
        config=MaskGitConfig(image_tokenizer_config=tokenizer, **fields),
        key_maps=key_maps,
        generation=generation,
    )


def _check_same_tokens(fields: Mapping[str, Any], tokenizer: TitokConfig) -> None:
    if tokenizer.quantization != "vq":
        raise ConversionError("The tokenizer has latents without codes, but the generator draws codes.")
    check_codes(fields["vocab_size"], tokenizer.codebook_size)
    if fields["num_image_tokens"] != tokenizer.num_latent_tokens:
        raise ConversionError(
            f"The generator draws {fields['num_image_tokens']} tokens, but the tokenizer has {tokenizer.num_latent_tokens}; give "
            "the tokenizer that belongs to it."
        )


CONVERTER = Converter(
    family="maskgit",
    roles={ROLE: ANY_GENERATOR, "tokenizer": ANY_TOKENIZER},
    plan=_plan,
    config_roles=("pixel_tokenizer",),
    hub_roles=(ROLE, "tokenizer"),
)
