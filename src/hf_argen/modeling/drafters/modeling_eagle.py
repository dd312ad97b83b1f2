"""EAGLE (arXiv 2401.15077; EAGLE-3, 2503.01840): a small decoder that drafts from a language model's hidden states."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from ...generation.decoding.speculative.drafters import Drafter, last_of_each
from ..checkpoints import ConversionError
from ..layers.attention import HeadedAttention, causal_mask
from ..layers.linear import linear
from ..layers.mlp import GatedMLP
from ..layers.normalization import RMSNorm
from . import speculators
from .configuration_eagle import EagleConfig
from .modeling_drafter import DrafterPreTrainedModel
from .released import INDEX, Release, linear_factor

WEIGHTS = ("pytorch_model.bin", "model.safetensors", INDEX)


@dataclass
class EagleOutput(ModelOutput):
    """
    What [`Eagle`] gives.

    Attributes:
        last_hidden_state: (batch, length, hidden_size), the features that it drafts, before any norm.
        logits: (batch, length, draft_vocab_size) of version 3; version 1 leaves them to the language model's head.
    """

    last_hidden_state: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@lru_cache(maxsize=16)
def frequencies(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """(head_dim,) float32, those of the rotary positions, twice; the same on every call."""
    half = theta ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    return torch.cat([half, half])


def rotary_halves(positions: torch.Tensor, config: EagleConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (batch, 1, length, head_dim) float32 of positions (batch, length), as Llama's."""
    scaled = positions.float() if config.rope_factor == 1.0 else positions.float() / config.rope_factor
    angles = scaled[:, None, :, None] * frequencies(config.head_dim, config.rope_theta, positions.device)
    return angles.cos(), angles.sin()


def rotate_halves(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns (batch, heads, length, head_dim), first halves against second ones."""
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


class EagleAttention(HeadedAttention):
    """Self-attention with grouped queries and rotary positions; `width` is that of its input."""

    is_causal = True

    def __init__(self, config: EagleConfig, layer_idx: int, width: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = (
            number * config.head_dim for number in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(width, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.dropout = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        query, key, value = self.heads(hidden_states)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (rotate_halves(states, *rotation) for states in (query, key))
        return self.attend(query, key, value, attention_mask, past_key_values)


class EagleLayer(nn.Module):
    """A decoder layer of version 1; its first one does not norm its input."""

    def __init__(self, config: EagleConfig, layer_idx: int):
        super().__init__()
        self.self_attn = EagleAttention(config, layer_idx, config.hidden_size)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) if layer_idx else nn.Identity()
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, *attention: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), *attention)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class EagleMiddleLayer(nn.Module):
    """The layer of version 3: attention reads embedding and features side by side, the residual are the features."""

    def __init__(self, config: EagleConfig):
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = EagleAttention(config, 0, 2 * config.hidden_size)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeds: torch.Tensor, hidden_states: torch.Tensor, *attention: Any) -> torch.Tensor:
        normed = self.hidden_norm(hidden_states)
        both = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        if self.norm_before_residual:
            hidden_states = normed
        hidden_states = hidden_states + self.self_attn(both, *attention)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Eagle(DrafterPreTrainedModel):
    """
    A drafter for a language model, which itself stays as it is.

    The feature of a position goes with the embedding of the token after it; what comes out is the feature of the next
    position.

    >>> eagle = Eagle.from_pretrained("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
    >>> hf_argen.generate(model, SpeculativeDecoding(eagle), **inputs)
    """

    config: EagleConfig
    config_class = EagleConfig
    base_model_prefix = "model"
    main_input_name = "hidden_states"
    _supports_sdpa = True
    _no_split_modules = ["EagleLayer", "EagleMiddleLayer"]

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.hidden_size) if config.has_embedding else None
        )
        if config.version == 1:
            self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
            self.layers = nn.ModuleList(EagleLayer(config, i) for i in range(config.num_hidden_layers))
        else:
            self.fc = nn.Linear(
                config.num_features * config.target_hidden_size, config.hidden_size, bias=False
            )
            if config.norm_before_fc:
                self.input_norm = RMSNorm(
                    config.num_features * config.target_hidden_size, config.rms_norm_eps
                )
            if config.fc_norm:
                self.fc_norm = nn.ModuleList(
                    RMSNorm(config.target_hidden_size, config.rms_norm_eps)
                    for _ in range(config.num_features)
                )
            self.midlayer = EagleMiddleLayer(config)
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
            if config.draft_vocab_size != config.vocab_size:
                self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    @classmethod
    def drafter_class(cls) -> type[Drafter]:
        from .drafting import EagleDrafter

        return EagleDrafter

    @classmethod
    def read_release(
        cls, release: Release, fields: dict[str, Any]
    ) -> tuple[EagleConfig, dict[str, torch.Tensor]]:
        """The authors' form: the configuration of a Llama, and tensors whose names tell the version. Or speculators'."""
        if speculators.TYPE in fields:
            return speculators.read(release, fields)
        tensors = release.tensors(WEIGHTS)
        if tensors is None or not any(name.startswith(("fc.", "midlayer.")) for name in tensors):
            raise ConversionError(
                f"{release.source!r} holds no EAGLE drafter: its weights have no fc or midlayer."
            )
        is_third = any(name.startswith("midlayer.") for name in tensors)
        state = {name: tensor.float() for name, tensor in tensors.items() if name not in ("t2d", "d2t")}
        vocab, draft_vocab = fields["vocab_size"], fields.get("draft_vocab_size")
        if is_third and not fields.get("target_hidden_size"):
            state.pop("embed_tokens.weight", None)  # the authors read the language model's own
        if is_third and draft_vocab not in (None, vocab):
            if "d2t" not in tensors:
                raise ConversionError(
                    f"d2t is missing in {release.source!r}; its {draft_vocab} tokens have no ids."
                )
            state["d2t"] = tensors["d2t"].long()
        taken = (
            *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
            *("hidden_act", "rms_norm_eps", "max_position_embeddings", "target_hidden_size", "rope_theta"),
        )
        config = EagleConfig(
            version=3 if is_third else 1,
            vocab_size=vocab,
            draft_vocab_size=draft_vocab if is_third else None,
            num_hidden_layers=1 if is_third else fields.get("num_hidden_layers", 1),
            attention_bias=any(name.endswith("q_proj.bias") for name in tensors),
            fc_bias="fc.bias" in tensors,
            has_embedding="embed_tokens.weight" in state,
            rope_factor=linear_factor(fields.get("rope_scaling"), release.source),
            **{name: fields[name] for name in taken if fields.get(name) is not None},
        )
        return config, state

    def get_output_embeddings(self) -> nn.Module | None:
        """The drafter's own head; version 1 has none."""
        return getattr(self, "lm_head", None)

    @property
    def draft_ids(self) -> torch.Tensor | None:
        """(draft_vocab_size,) int64: which tokens the logits are of; `None` if of all in their order."""
        offsets = getattr(self, "d2t", None)
        return None if offsets is None else torch.arange(len(offsets), device=offsets.device) + offsets

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        with_logits: bool = True,
        counts: list[int] | None = None,
    ) -> EagleOutput:
        """
        Args:
            hidden_states: (batch, length, features): the language model's, of version 3 those of three layers one after
                another; or (batch, length, hidden_size) what this network has drafted itself.
            input_ids: (batch, length) int64, the token after each position.
            inputs_embeds: (batch, length, hidden_size), instead of ids where it has no embeddings of its own.
            attention_mask: additive, (batch or 1, 1, length, positions); default: causal.
            position_ids: (batch, length) int64, of the hidden states; default: 0, 1, 2, ...
            with_logits: whether version 3 computes its logits; `logits_of` gives those of some positions.
            counts: how many positions of each row are meant; then only what is drafted after the last of them is given,
                a length of 1, since the head is most of the work. Default: all.
        """
        if inputs_embeds is None:
            if self.embed_tokens is None:
                raise ValueError(
                    "This Eagle has no embeddings of its own; give inputs_embeds of the language model."
                )
            inputs_embeds = self.embed_tokens(input_ids)
        embeds = inputs_embeds.to(hidden_states.dtype)
        length = hidden_states.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, device=hidden_states.device)[None]
        if attention_mask is None and past_key_values is None and length > 1:
            attention_mask = causal_mask(length, None, hidden_states.dtype, hidden_states.device)
        attention = (rotary_halves(position_ids, self.config), attention_mask, past_key_values)
        if self.config.version == 1:
            hidden_states = linear(self.fc, torch.cat([embeds, hidden_states], dim=-1))
            for layer in self.layers:
                hidden_states = layer(hidden_states, *attention)
        else:
            if hidden_states.shape[-1] != self.config.hidden_size:
                hidden_states = linear(self.fc, self._normed_features(hidden_states))
            hidden_states = self.midlayer(embeds, hidden_states, *attention)
        if counts is not None:
            hidden_states = last_of_each(hidden_states, counts)[:, None]
        if self.config.version == 1:
            return EagleOutput(last_hidden_state=hidden_states)
        if self.config.norm_output:
            hidden_states = self.norm(hidden_states)
        logits = self.logits_of(hidden_states) if with_logits else None
        return EagleOutput(last_hidden_state=hidden_states, logits=logits)

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., draft_vocab_size) of drafted features (..., hidden_size); of version 3."""
        normed = hidden_states if self.config.norm_output else self.norm(hidden_states)
        return linear(self.lm_head, normed)

    def _normed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the language model as `fc` reads them."""
        if self.config.norm_before_fc:
            return self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(self.config.num_features, dim=-1)
            return torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return features

    def save_speculators(self, folder: str | Path, target: PreTrainedModel) -> None:
        """
        Writes version 3 as the library speculators and vLLM read it.

        Args:
            folder: where; made where it is missing.
            target: the language model that it drafts for, named in the configuration.

        Raises:
            ValueError: version 1, or it reads a hidden state that they do not have.
        """
        speculators.write(self, Path(folder), target)
