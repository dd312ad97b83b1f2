"""MAR: an encoder and a decoder see the known tokens from both sides, a head draws hidden ones (arXiv 2406.11838)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ...generation.mixin import ImageGenerationMixin
from ...generation.predictors.masked import MaskedPredictor
from ...generation.sampling import Generators
from ..base import ArgenPreTrainedModel, ImageModelMixin
from ..heads.continuous import ContinuousHead
from ..heads.registry import build_head
from ..layers.attention import causal_part
from ..layers.patches import patchify, unpatchify
from ..layers.precision import suited
from ..layers.prenorm import PreNormLayer
from ..masked_training import MaskedTrainingMixin
from ..token_condition import TokenConditionModules, additive_mask
from ..tokenizers.configuration_grid import normalize_grid
from ..vector_condition import VectorConditionMixin
from .configuration_mar import MarConfig

MASK_RATIO_STD = (
    0.25  # of the normal distribution around 1 from which training draws the share of hidden tokens
)


@dataclass
class MarOutput(ModelOutput):
    """
    Output of the teacher-forced pass.

    Attributes:
        loss: mean loss of the head over hidden tokens, scalar float32.
        last_hidden_state: (batch, tokens, decoder_hidden_size), what the head predicts each token from.
        mask: (batch, tokens) bool, the hidden ones.
    """

    loss: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    mask: torch.BoolTensor | None = None


class MarPreTrainedModel(ArgenPreTrainedModel):
    """Weight initialisation and switches of the family."""

    config: MarConfig
    config_class = MarConfig
    base_model_prefix = "model"
    main_input_name = "class_labels"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["PreNormLayer", "ModulatedBlock"]
    _keep_in_fp32_modules = ["image_tokenizer", "text_projection", "head"]
    # Also beside bfloat16: the first step of a diffusion head multiplies its errors by several hundred.
    _keep_in_fp32_modules_strict = ["head"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' scheme."""
        if isinstance(module, ContinuousHead):
            module.init_weights()
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MarModel(TokenConditionModules, MarPreTrainedModel):
    """
    The transformer without head. The encoder reads a prefix, the condition repeated or the tokens of a caption, and the known
    tokens; the decoder these and a mask token at every hidden place.
    """

    parts_of_larger_models = ("head.", "image_tokenizer.")

    def __init__(self, config: MarConfig):
        super().__init__(config)
        hidden, tokens = config.hidden_size, config.num_image_tokens
        positions = config.num_buffer_tokens + tokens
        if config.condition_type == "class":
            self.class_embedding = nn.Embedding(config.num_classes, hidden)
            self.null_embedding = nn.Embedding(1, hidden)
        else:
            self.add_condition_modules(config)
        sizes = (hidden, config.num_attention_heads, config.intermediate_size)
        reads_text = config.conditioning == "cross_attention"
        if config.conditioning != "vector":
            text_layers = (PreNormLayer(config, *sizes) for _ in range(config.num_text_layers))
            self.add_token_modules(text_layers, hidden, config.layer_norm_eps)
        if reads_text:
            self.buffer_embedding = nn.Embedding(1, hidden)
        self.embed_tokens = nn.Linear(config.token_size, hidden)
        self.encoder_position_embedding = nn.Embedding(positions, hidden)
        self.embed_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        depth = config.num_hidden_layers
        self.encoder_layers = nn.ModuleList(PreNormLayer(config, *sizes, reads_text, i) for i in range(depth))
        self.encoder_norm = nn.LayerNorm(hidden, config.layer_norm_eps)

        width = config.decoder_hidden_size
        self.decoder_proj = nn.Linear(hidden, width)
        if config.causal:
            self.start_embedding = nn.Embedding(1, hidden)
        else:
            self.mask_embedding = nn.Embedding(1, width)
        self.decoder_position_embedding = nn.Embedding(positions, width)
        sizes = (width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
        self.decoder_layers = nn.ModuleList(
            PreNormLayer(config, *sizes, reads_text, depth + i)
            for i in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.output_position_embedding = nn.Embedding(tokens, width)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @property
    def dtype_of_computation(self) -> torch.dtype:
        """See [`VectorConditionModules`]."""
        return self.encoder_position_embedding.weight.dtype

    def class_condition(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Class labels (batch,), -1 or the number of classes for none, to conditions (batch, hidden_size)."""
        classes = self.config.num_classes
        is_null = (class_labels < 0) | (class_labels >= classes)
        null = self.null_embedding(torch.zeros_like(class_labels))
        return torch.where(is_null[:, None], null, self.class_embedding(class_labels.clamp(0, classes - 1)))

    def vector_prefix(self, condition: torch.Tensor) -> torch.Tensor:
        """A condition (batch, hidden_size) repeated in the buffer, (batch, num_buffer_tokens, hidden_size)."""
        return condition.unsqueeze(1).expand(-1, self.config.num_buffer_tokens, -1)

    def empty_prefix(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """A buffer that says nothing, for models that attend to captions."""
        rows = torch.zeros(batch_size, dtype=torch.long, device=device)
        return self.vector_prefix(self.buffer_embedding(rows))

    def forward(
        self,
        tokens: torch.FloatTensor,
        visible: torch.LongTensor,
        prefix: torch.FloatTensor,
        prefix_mask: torch.BoolTensor | None = None,
        text: torch.FloatTensor | None = None,
        text_mask: torch.BoolTensor | None = None,
        valid: torch.BoolTensor | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutput | tuple:
        """
        Args:
            tokens: (batch, n, token_size), the known ones.
            visible: (batch, n) int64, their places, row by row of the picture.
            prefix: (batch, up to num_buffer_tokens, hidden_size), what precedes the picture.
            prefix_mask: (batch, as many) bool, false where a shorter prefix is padded.
            text, text_mask: (batch, m, hidden_size) and (batch, m), the caption that layers attend to.
            valid: (batch, n) bool, false where a shorter row is padded; its places are then the number of tokens.

        Returns:
            `last_hidden_state` (batch, tokens, decoder_hidden_size), known places included.
        """
        dtype = self.dtype_of_computation
        caption = () if text is None else (text, additive_mask(text_mask, dtype))
        encoded = self.encode(tokens, visible, prefix, prefix_mask, caption, valid)
        hidden_states = self.decode(encoded, visible, prefix_mask, caption)
        output = BaseModelOutput(last_hidden_state=hidden_states)
        return output if return_dict else output.to_tuple()

    def encode(
        self,
        tokens: torch.Tensor,
        visible: torch.Tensor,
        prefix: torch.Tensor,
        prefix_mask: torch.Tensor | None = None,
        caption: tuple[torch.Tensor | None, ...] = (),
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Prefix and known tokens through the encoder, (batch, prefix + n, hidden_size)."""
        embedded = self.embed_tokens(suited(tokens.to(self.dtype_of_computation), self.embed_tokens))
        hidden_states = torch.cat([prefix, embedded], dim=1)
        inside = visible.clamp(max=self.config.num_image_tokens - 1)
        places = self._behind(prefix, inside + self.config.num_buffer_tokens)
        hidden_states = self.embed_norm(hidden_states + self.encoder_position_embedding(places))
        mask = self._seen(prefix, prefix_mask, visible, valid)
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states, mask, *caption)
        return self.encoder_norm(hidden_states)

    def decode(
        self,
        encoded: torch.Tensor,
        visible: torch.Tensor,
        prefix_mask: torch.Tensor | None = None,
        caption: tuple[torch.Tensor | None, ...] = (),
    ) -> torch.Tensor:
        """What the encoder made of prefix and known tokens through the decoder, (batch, tokens, decoder_hidden_size)."""
        tokens, length = self.config.num_image_tokens, encoded.shape[1] - visible.shape[1]
        projected = self.decoder_proj(encoded)
        batch, _, width = projected.shape
        everywhere = torch.arange(tokens, device=projected.device).expand(batch, -1)
        masked = self.mask_embedding(torch.zeros_like(everywhere[:1, :1])).to(projected.dtype)
        # One place more, where padding goes.
        hidden_states = masked.expand(batch, length + tokens + 1, width)
        places = self._behind(encoded[:, :length], visible + length).unsqueeze(-1).expand(-1, -1, width)
        hidden_states = hidden_states.scatter(1, places, projected)[:, :-1]
        positions = self._behind(encoded[:, :length], everywhere + self.config.num_buffer_tokens)
        hidden_states = hidden_states + self.decoder_position_embedding(positions[:1])
        mask = self._seen(encoded[:, :length], prefix_mask, everywhere, None)
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states, mask, *caption)
        hidden_states = self.decoder_norm(hidden_states)[:, length:]
        return hidden_states + self.output_position_embedding(everywhere[:1])

    def next_states(
        self,
        tokens: torch.Tensor,
        start: int,
        prefix: torch.Tensor,
        prefix_mask: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """
        The causal form: what the head predicts each token from, given those before it.

        Args:
            tokens: (batch, n, token_size), from that at `start` - 1 on, or from the first on where `start` is 0.
            start: place of the first prediction; above 0, prefix and earlier tokens are in the cache.
            prefix, prefix_mask, text, text_mask: see `forward`.
            past_key_values: keys and values of all before.

        Returns:
            (batch, n, decoder_hidden_size), of the places from `start` on; one more where that is 0.
        """
        dtype, buffer = self.dtype_of_computation, self.config.num_buffer_tokens
        caption = (text, additive_mask(text_mask, dtype), past_key_values)
        hidden_states = self.embed_tokens(suited(tokens.to(dtype), self.embed_tokens))
        if start == 0:
            first = self.start_embedding(tokens.new_zeros(len(tokens), 1, dtype=torch.long))
            hidden_states = torch.cat([first, hidden_states], dim=1)
        count = hidden_states.shape[1]
        targets = torch.arange(start, start + count, device=tokens.device)
        places = targets + buffer
        if start == 0:
            hidden_states = torch.cat([prefix, hidden_states], dim=1)
            places = torch.cat([torch.arange(prefix.shape[1], device=places.device), places])
        hidden_states = self.embed_norm(hidden_states + self.encoder_position_embedding(places))
        mask = self._seen(prefix, prefix_mask, places.new_zeros(len(tokens), start + count), None)
        mask = causal_part(hidden_states, prefix.shape[1] + start + count, mask)
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states, mask, *caption)
        hidden_states = self.decoder_proj(self.encoder_norm(hidden_states))
        hidden_states = hidden_states + self.decoder_position_embedding(places)
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states, mask, *caption)
        return self.decoder_norm(hidden_states)[:, -count:] + self.output_position_embedding(targets)

    @staticmethod
    def _behind(prefix: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Places (batch, n), with those of a prefix before them."""
        first = torch.arange(prefix.shape[1], device=places.device).expand(len(places), -1)
        return torch.cat([first, places], dim=1)

    def _seen(
        self,
        prefix: torch.Tensor,
        prefix_mask: torch.Tensor | None,
        places: torch.Tensor,
        valid: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Additive mask (batch, 1, 1, prefix + n) under which no one sees padding, of prefix or tokens."""
        if prefix_mask is None and valid is None:
            return None
        parts = (
            torch.ones(one.shape[:2], dtype=torch.bool, device=places.device) if mask is None else mask
            for one, mask in ((prefix, prefix_mask), (places, valid))
        )
        return additive_mask(torch.cat(tuple(parts), dim=1), self.dtype_of_computation)


class MarForImageGeneration(
    MaskedTrainingMixin, ImageModelMixin, VectorConditionMixin, MarPreTrainedModel, ImageGenerationMixin
):
    """
    MAR with head and visual tokenizer: training on masked pictures, and generation of sets of tokens in any order.

    >>> model = hf_argen.convert_original("mar", {"transformer": "checkpoint-last.pth", "tokenizer": "kl16.ckpt"})
    >>> images = model.decode_images(model.generate(class_labels=[207, 980], guidance_scale=2.9))
    """

    predictor_class = MaskedPredictor
    draws_latents = True
    default_guidance_schedule = "linear"
    neutral_guidance_scale = 1.0

    def __init__(self, config: MarConfig):
        super().__init__(config)
        self.model = MarModel(config)
        self.head = build_head(config.head_config, config.token_size, config.decoder_hidden_size)
        self.image_tokenizer = self.build_image_tokenizer(config.image_tokenizer_config)
        self.generation_config.do_sample = True  # continuous tokens have no likeliest one
        if config.causal:
            self.generation_config.decoding = {"type": "masked", "order": "raster"}
        self.post_init()

    def check_tokenizer_fits(self, config: PreTrainedConfig) -> None:
        """Refuses a tokenizer of other latents or another grid; one that takes pictures of any size gets the grid."""
        own = self.config
        if not hasattr(config, "latent_scale"):
            raise ValueError(f"An image tokenizer of type {config.model_type!r} has no grid of latents.")
        if config.latent_channels != own.latent_channels:
            raise ValueError(
                f"latent_channels is {own.latent_channels} in the model and {config.latent_channels} in its image "
                "tokenizer; they must agree."
            )
        config.grid_size = config.grid_size or normalize_grid(own.latent_grid)
        if config.grid_sizes != [own.latent_grid]:
            raise ValueError(
                f"The grid of latents is {own.latent_grid} in the model and {config.grid_sizes[0]} in its image "
                "tokenizer; they must agree."
            )

    # Latents and tokens

    def to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (batch, h * w, latent_channels) to tokens (batch, tokens, token_size): channel, row, column."""
        return patchify(latents, self.config.grid_sizes[0], self.config.patch_size)

    def from_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_tokens`."""
        return unpatchify(tokens, self.config.grid_sizes[0], self.config.patch_size)

    # Generation; see MaskedPredictor

    def conditions(self, drop: torch.Tensor | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
        """
        What the pictures shall show, as keywords of the model's `forward`, each (batch, ...).

        Args:
            drop: (batch,) bool, rows that take the null condition instead.
            inputs: see `condition`.
        """
        if self.config.conditioning == "vector":
            return {"prefix": self.model.vector_prefix(self.condition(**inputs, drop=drop))}
        if (count := inputs.pop("batch_size", None)) is not None:
            return self._with_text(*self.model.null_text_tokens(count, 1, self.input_device))
        if inputs.pop("class_labels", None) is not None:
            raise ValueError(
                "This model draws from text; give prompt_ids or prompt_embeds, not class_labels."
            )
        return self._with_text(*self.model.text_tokens(**inputs, drop=drop))

    def null_conditions(self, conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The conditions of unconditional rows, of the shapes of others."""
        count = len(conditions["prefix"])
        if self.config.conditioning == "vector":
            return {"prefix": self.model.vector_prefix(self.null_condition(count))}
        tokens = conditions["text" if self.config.conditioning == "cross_attention" else "prefix"]
        return self._with_text(*self.model.null_text_tokens(count, tokens.shape[1], tokens.device))

    def _with_text(self, text: torch.Tensor, seen: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.config.conditioning == "cross_attention":
            return {
                "prefix": self.model.empty_prefix(len(text), text.device),
                "text": text,
                "text_mask": seen,
            }
        most = self.config.num_buffer_tokens
        if text.shape[1] > most:
            raise ValueError(f"A prompt has {text.shape[1]} tokens; this model reads {most} at most.")
        return {"prefix": text, "prefix_mask": seen}

    def masked_hidden_states(
        self,
        tokens: torch.Tensor,
        visible: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the head draws from at every place, (rows, tokens, decoder_hidden_size)."""
        return self.model(tokens, visible, **conditions, valid=valid).last_hidden_state

    # Training

    def forward(
        self,
        latents: torch.FloatTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        prompt_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        mask: torch.BoolTensor | None = None,
        noise_seeds: torch.LongTensor | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> MarOutput | tuple:
        """
        Pass over a picture of which some tokens are hidden.

        Args:
            latents: (batch, h * w, latent_channels), scaled, as the tokenizer's `encode` gives them.
            class_labels: (batch,) class of each picture, -1 for none.
            prompt_embeds, prompt_ids, prompt_attention_mask: see `condition`.
            pixel_values: (batch, channels, height, width) in [-1, 1], encoded here, instead of `latents`; in training mode
                their latents are drawn.
            labels: (batch, h * w, latent_channels), the latents to predict, normally `latents` themselves. With
                `pixel_values` they are known already.
            mask: (batch, tokens), nonzero at the tokens that are hidden, as many in every row; default: `draw_mask`.
            noise_seeds: (batch,) int64, a seed for the noise of each picture, so that losses can be compared; default:
                torch's global generator.
            return_loss: with `pixel_values` and no `labels`, also compute the loss.

        Raises:
            ValueError: neither or both of latents and pixels, a condition that is missing, a mask that hides nothing, a shape
                that does not fit.
        """
        generator = self.generators_of(noise_seeds, self.input_device)
        latents, labels = self._latents_and_labels(latents, pixel_values, labels, return_loss, generator)
        batch, device = len(latents), latents.device
        mask = self.draw_mask(batch, device) if mask is None else self.checked_mask(mask, batch)
        drop = self.draw_dropped_conditions(batch, device) if self.training else None
        conditions = self.conditions(
            class_labels=class_labels,
            prompt_embeds=prompt_embeds,
            prompt_ids=prompt_ids,
            prompt_attention_mask=prompt_attention_mask,
            drop=drop,
        )
        if (count := len(conditions["prefix"])) != batch:
            raise ValueError(f"There are {count} conditions for {batch} pictures.")
        tokens = self.to_tokens(latents)
        hidden = self._hidden_states(tokens, mask, conditions)
        loss = None
        if labels is not None:
            loss = self.head.loss(self.to_tokens(labels), hidden, mask, generator)
        output = MarOutput(loss=loss, last_hidden_state=hidden, mask=mask)
        return output if return_dict is not False else output.to_tuple()

    def _hidden_states(
        self, tokens: torch.Tensor, mask: torch.Tensor, conditions: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """What the head predicts the hidden tokens from."""
        if self.config.causal:
            return self.model.next_states(tokens[:, :-1], 0, **conditions)
        known = int((~mask[0]).sum())
        visible = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, :known]
        seen = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        return self.masked_hidden_states(seen, visible, conditions, None)

    def _latents_and_labels(
        self, latents: Any, pixel_values: Any, labels: Any, return_loss: bool, generator: Generators
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents and what to predict, from either kind of input."""
        if (latents is None) == (pixel_values is None):
            raise ValueError("Give either latents or pixel_values.")
        if pixel_values is not None:
            tokenizer = self.check_image_tokenizer()
            with torch.no_grad():
                latents = tokenizer.encode(pixel_values, sample=self.training, generator=generator)
            labels = latents if labels is None and return_loss else labels
        height, width = self.config.latent_grid
        expected = (height * width, self.config.latent_channels)
        for name, value in {"latents": latents, "labels": labels}.items():
            if value is not None and (value.ndim != 3 or value.shape[1:] != expected):
                raise ValueError(
                    f"{name} have the shape {tuple(value.shape)}; pictures of this model have (batch, {expected[0]}, "
                    f"{expected[1]})."
                )
        return latents, labels
