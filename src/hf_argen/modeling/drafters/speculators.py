"""EAGLE-3 in the form of the library speculators (vllm-project/speculators), which vLLM reads."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel

from ..checkpoints import ConversionError
from .configuration_eagle import EagleConfig
from .released import CONFIG, INDEX, Release, linear_factor

if TYPE_CHECKING:
    from .modeling_eagle import Eagle

TYPE = "speculators_model_type"
WEIGHTS = "model.safetensors"
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
LAYER_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_bias", "vocab_size"),
)
KINDS = {"llama": False, "qwen3": True}  # of the layer: whether it norms queries and keys
SPECULATIVE_TOKENS = 3  # that engines are told to draft


def read(release: Release, fields: dict[str, Any]) -> tuple[EagleConfig, dict[str, torch.Tensor]]:
    """
    The configuration and our state dict of a folder whose `config.json` says `fields`.

    Raises:
        ConversionError: another algorithm, or a layer that is not of a kind we have.
    """
    if fields[TYPE] != "eagle3":
        raise ConversionError(
            f"{release.source!r} is a speculator of the type {fields[TYPE]!r}; only 'eagle3' is known."
        )
    own = dict(fields.get("transformer_layer_config") or {})
    kind = own.pop("model_type", "qwen3")
    if kind not in KINDS:
        raise ConversionError(
            f"The layer of {release.source!r} is one of {kind!r}; known are {', '.join(KINDS)}."
        )
    layer = AutoConfig.for_model(kind, **own)  # the file leaves out what is the default of its class
    if layer.num_hidden_layers != 1:
        raise ConversionError(f"{release.source!r} has {layer.num_hidden_layers} layers; EAGLE-3 has one.")
    tensors = release.tensors((WEIGHTS, INDEX))
    if tensors is None:
        raise ConversionError(f"{WEIGHTS} is missing in {release.source!r}; fetch it.")
    state = {re.sub(r"^layers\.0\.", "midlayer.", name): tensor.float() for name, tensor in tensors.items()}
    offsets = tensors.get("d2t")
    for name in ("d2t", "t2d"):
        state.pop(name, None)
    draft_vocab = fields.get("draft_vocab_size", 32000)
    if draft_vocab != layer.vocab_size:
        if offsets is None:
            raise ConversionError(
                f"d2t is missing in {release.source!r}; its {draft_vocab} tokens have no ids."
            )
        state["d2t"] = offsets.long()
    rope = layer.rope_parameters
    verifier = (fields.get("speculators_config") or {}).get("verifier") or {}
    config = EagleConfig(
        version=3,
        draft_vocab_size=draft_vocab,
        target_hidden_size=fields.get("target_hidden_size"),
        feature_layers=fields.get("eagle_aux_hidden_state_layer_ids"),
        base_model_name_or_path=verifier.get("name_or_path"),
        has_embedding="embed_tokens.weight" in state,
        qk_norm=KINDS[kind],
        rope_theta=rope["rope_theta"],
        rope_factor=linear_factor(None if rope["rope_type"] == "default" else rope, release.source),
        **{name: getattr(layer, name) for name in LAYER_SIZES},
        **{name: bool(fields.get(name)) for name in SWITCHES},
    )
    return config, state


def fields_of(config: EagleConfig, target: PreTrainedModel) -> dict[str, Any]:
    """What `config.json` says about a drafter for a language model."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1.0:
        rope |= {"rope_type": "linear", "factor": config.rope_factor}
    layer = {name: getattr(config, name) for name in LAYER_SIZES}
    kind = next(name for name, has_norms in KINDS.items() if has_norms == config.qk_norm)
    is_wider = config.target_hidden_size != config.hidden_size
    return {
        TYPE: "eagle3",
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size if is_wider else None,
        "eagle_aux_hidden_state_layer_ids": config.feature_layers,
        **{name: getattr(config, name) for name in SWITCHES},
        "transformer_layer_config": {
            "model_type": kind,
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            **layer,
            "rope_parameters": rope,
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": SPECULATIVE_TOKENS}],
            "verifier": {
                "name_or_path": target.name_or_path or None,
                "architectures": target.config.architectures or [type(target).__name__],
            },
        },
    }


def write(eagle: "Eagle", folder: Path, target: PreTrainedModel) -> None:
    """Writes `eagle` for `target`; see [`Eagle.save_speculators`]."""
    config = eagle.config
    if config.version != 3:
        raise ValueError("speculators has no form for version 1 of Eagle; only version 3 can be written.")
    last = target.config.get_text_config().num_hidden_layers
    if any(layer in (-1, last) for layer in config.feature_layers or ()):
        raise ValueError(
            f"The Eagle reads the hidden states {config.feature_layers}, the last of them after the last norm; engines give "
            "the ones before it, so it cannot be written for them."
        )
    state = {re.sub(r"^midlayer\.", "layers.0.", name): tensor for name, tensor in eagle.state_dict().items()}
    if eagle.draft_ids is not None:
        state["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(
            0, eagle.draft_ids.cpu(), True
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(fields_of(config, target), indent=2) + "\n", encoding="utf-8")
