"""LlamaGen: a Llama with 2-D rotary embedding over the tokens of a picture, row by row (arXiv 2406.06525)."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, T5EncoderModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ...generation.mixin import ImageGenerationMixin
from ...generation.predictors.next_token import NextTokenPredictor, Prompt
from ...kernels.qk_norm_rope import Rotation
from ..base import ArgenPreTrainedModel, ImageModelMixin
from ..heads.categorical import CategoricalHead
from ..layers.attention import HeadedAttention, causal_mask
from ..layers.drop_path import DropPath
from ..layers.mlp import GatedMLP
from ..layers.normalization import RMSNorm
from ..layers.rotary import rotary_2d
from ..tokenizers.configuration_grid import check_same_tokens
from .configuration_llamagen import LlamaGenConfig


@dataclass
class LlamaGenOutput(ModelOutput):
    """
    Output of the teacher-forced pass.

    Attributes:
        loss: mean cross-entropy over tokens and batch, scalar float32.
        logits: (batch, tokens, vocab_size) float32; position i is the prediction of token i.
        hidden_states: with `output_hidden_states`, the input of the first layer and the output of every layer, condition
            included.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class LlamaGenAttention(HeadedAttention):
    """Multi-head self-attention with rotary embedding."""

    def __init__(self, config: LlamaGenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.is_causal = True
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: Rotation,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        query, key, value = self.heads(hidden_states)
        return self.attend(query, key, value, attention_mask, past_key_values, rotation=rotation)


class LlamaGenLayer(GradientCheckpointingLayer):
    """Attention and gated feed-forward block, each behind a norm."""

    def __init__(self, config: LlamaGenConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaGenAttention(config, layer_idx)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_dropout
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        depth = max(config.num_hidden_layers - 1, 1)
        self.drop_path = DropPath(config.drop_path_rate * layer_idx / depth)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: Rotation,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        parts = self._modules  # see `linears`
        normed = parts["input_layernorm"](hidden_states)
        attended = parts["self_attn"](normed, rotation, attention_mask, past_key_values)
        if self.training:
            attended = self.drop_path(attended)
        normed, hidden_states = parts["post_attention_layernorm"](hidden_states, attended)
        transformed = parts["mlp"](normed)
        if self.training:
            transformed = self.drop_path(transformed)
        return hidden_states + transformed


class CaptionProjection(nn.Module):
    """Caption embeddings (..., text_embed_dim) to hidden states (..., hidden_size)."""

    def __init__(self, text_embed_dim: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(text_embed_dim, hidden_size, bias=False)
        self.fc2 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(embeds), approximate="tanh"))


class LlamaGenPreTrainedModel(ArgenPreTrainedModel):
    """Weight initialisation and switches of the family."""

    config: LlamaGenConfig
    config_class = LlamaGenConfig
    base_model_prefix = "model"
    main_input_name = "class_labels"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaGenLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules = ["image_tokenizer", "wo"]  # wo: T5 overflows there in float16
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    reads_trees = True  # its attention takes a TreeView of the cache in place of a mask

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' scheme: everything normal, the head zero, so that a new model is uniform."""
        std = self.config.initializer_range
        if isinstance(module, CategoricalHead):
            init.zeros_(module.out_proj.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, LlamaGenModel) and self.config.condition_type == "text":
            init.normal_(module.null_text_embedding, std=self.config.text_embed_dim**-0.5)


class LlamaGenModel(LlamaGenPreTrainedModel):
    """The transformer without head."""

    parts_of_larger_models = ("head.", "image_tokenizer.", "text_encoder.")

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.condition_type == "class":
            rows = config.num_classes + config.has_null_class
            self.class_embedding = nn.Embedding(rows, config.hidden_size)
        else:
            self.text_projection = CaptionProjection(config.text_embed_dim, config.hidden_size)
            null = torch.empty(config.max_prompt_tokens, config.text_embed_dim)
            self.register_buffer("null_text_embedding", null)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(LlamaGenLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutput | tuple:
        """
        Args:
            input_ids: (batch, n) image tokens; or `inputs_embeds` (batch, n, hidden_size) in their place.
            attention_mask: additive, (batch or 1, 1, n, positions); `None`: plain causal without cache, all that the
                cache holds with one.
            position_ids: (batch, n), counted from the first position of the condition; default: from 0.
            past_key_values: keys and values of earlier positions.

        Returns:
            `last_hidden_state` (batch, n, hidden_size) after the final norm.
        """
        config = self.config
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        width = config.grid_sizes[0][1]
        rotation = rotary_2d(position_ids, config.head_dim, width, config.rope_theta, config.prefix_length)
        hidden_states = self.dropout(hidden_states)
        all_hidden_states = (hidden_states,)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotation, attention_mask, past_key_values)
            all_hidden_states += (hidden_states,)
        output = (self.norm(hidden_states), *([all_hidden_states] if output_hidden_states else []))
        return BaseModelOutput(*output) if return_dict else output


class LlamaGenForImageGeneration(ImageModelMixin, LlamaGenPreTrainedModel, ImageGenerationMixin):
    """
    LlamaGen with head and visual tokenizer: training and generation, by class or by caption.

    >>> model = LlamaGenForImageGeneration.from_original("FoundationVision/LlamaGen", variant="c2i-b-256")
    >>> images = model.decode_images(model.generate(class_labels=[207, 980], guidance_scale=2.0))
    """

    predictor_class = NextTokenPredictor
    neutral_guidance_scale = 1.0
    clips_top_k = True

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.model = LlamaGenModel(config)
        self.head = CategoricalHead(config.hidden_size, config.vocab_size, bias=False)
        self.image_tokenizer = self.build_image_tokenizer(config.image_tokenizer_config)
        self.text_encoder = self.build_text_encoder(config.text_encoder_config)
        self.post_init()

    def check_tokenizer_fits(self, config: PreTrainedConfig) -> None:
        """Refuses a tokenizer of other codes or another grid; one that takes pictures of any size gets the grid."""
        check_same_tokens(self.config, config)

    # The condition

    def train(self, mode: bool = True) -> Self:
        """As in torch; a finished text encoder stays frozen, in evaluation mode, as the image tokenizer does."""
        super().train(mode)
        if self.text_encoder is not None and self.config.freeze_text_encoder:
            self.text_encoder.eval().requires_grad_(False)
        return self

    def build_text_encoder(self, config: PreTrainedConfig | None) -> nn.Module | None:
        """A T5 encoder."""
        return None if config is None else self._frozen(T5EncoderModel(config))

    def _frozen(self, encoder: nn.Module) -> nn.Module:
        return encoder.requires_grad_(not self.config.freeze_text_encoder)

    def attach_text_encoder(self, encoder: T5EncoderModel) -> None:
        """Makes a T5 encoder (for the released models FLAN-T5-XL) part of the model, to be saved with it."""
        if encoder.config.d_model != self.config.text_embed_dim:
            raise ValueError(
                f"The text encoder is {encoder.config.d_model} wide; this model takes {self.config.text_embed_dim}."
            )
        self.config.text_encoder_config = encoder.config
        self.text_encoder = self._frozen(encoder)

    def encode_prompts(
        self, prompt_ids: torch.LongTensor, prompt_attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Captions to embeddings (batch, max_prompt_tokens, text_embed_dim), words last, and their mask.

        Args:
            prompt_ids, prompt_attention_mask: (batch, tokens), padded on either side.
        """
        if self.text_encoder is None:
            raise ValueError(
                "This model has no text encoder; give prompt_embeds, or attach one with attach_text_encoder."
            )
        if prompt_attention_mask is None:
            prompt_attention_mask = torch.ones_like(prompt_ids)
        if prompt_ids.shape[1] > self.config.max_prompt_tokens:
            raise ValueError(
                f"prompt_ids have {prompt_ids.shape[1]} tokens; this model reads at most "
                f"{self.config.max_prompt_tokens}: cut them."
            )
        # Encoded with the words first, as in training; T5's relative positions do not depend on that.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_text_encoder):
            embeds = self.text_encoder(prompt_ids, attention_mask=prompt_attention_mask).last_hidden_state
        return words_last(embeds, prompt_attention_mask, self.config.max_prompt_tokens)

    def condition(
        self,
        class_labels: torch.LongTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        prompt_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        batch_size: int | None = None,
    ) -> Prompt:
        """
        What the pictures shall show, as hidden states (batch, prefix_length, hidden_size).

        Args:
            class_labels: (batch,) int64, negative for none; class-conditional models.
            prompt_embeds: (batch, tokens, text_embed_dim), words last; up to `max_prompt_tokens` of them, fewer are
                padded on the left. `prompt_attention_mask` (batch, tokens) must come with them.
            prompt_ids, prompt_attention_mask: (batch, tokens), for the text encoder inside the model.
            drop: (batch,) bool, the rows that take the null condition instead.
            batch_size: without any condition, the number of rows of the null condition.
        """
        if batch_size is not None:
            return self.null_condition(batch_size)
        if self.config.condition_type == "class":
            if class_labels is None:
                raise ValueError("class_labels are missing; use -1 for a row without class.")
            self.check_class_labels(class_labels)
            labels = torch.where(class_labels < 0, self.config.num_classes, class_labels)
            if drop is not None:
                labels = torch.where(drop, self.config.num_classes, labels)
            return Prompt(self.model.class_embedding(labels).unsqueeze(1))
        if prompt_embeds is None and prompt_ids is None:
            raise ValueError("This model draws from text; give prompt_ids or prompt_embeds.")
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self.encode_prompts(prompt_ids, prompt_attention_mask)
        embeds, mask = self._check_captions(prompt_embeds, prompt_attention_mask)
        if drop is not None:
            null = self.model.null_text_embedding.to(embeds.dtype)
            embeds = torch.where(drop[:, None, None], null, embeds)
        return Prompt(self.model.text_projection(embeds.to(self.model.norm.weight.dtype)), mask)

    def _check_captions(
        self, embeds: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width, length = self.config.text_embed_dim, self.config.max_prompt_tokens
        if embeds.ndim != 3 or embeds.shape[-1] != width or embeds.shape[1] > length:
            raise ValueError(
                f"prompt_embeds have the shape {tuple(embeds.shape)}; this model takes (batch, up to {length}, {width})."
            )
        if mask is None:
            raise ValueError(
                "prompt_embeds came without prompt_attention_mask; give it, 1 for a word and 0 for padding."
            )
        if mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"prompt_attention_mask has the shape {tuple(mask.shape)}; it must be {tuple(embeds.shape[:2])}."
            )
        missing = length - embeds.shape[1]
        return F.pad(embeds, (0, 0, missing, 0)), F.pad(mask, (missing, 0))

    def check_class_labels(self, class_labels: torch.Tensor) -> None:
        """Refuses labels that are neither a class nor the null class."""
        if class_labels.ndim != 1 or class_labels.is_floating_point():
            raise ValueError(f"class_labels must be whole numbers (batch,); got {tuple(class_labels.shape)}.")
        if not class_labels.numel():
            return
        if int(class_labels.max()) > self.config.num_classes - (not self.config.has_null_class):
            raise ValueError(
                f"class label {int(class_labels.max())} is out of range; this model has the classes 0 to "
                f"{self.config.num_classes - 1}, and -1 for none."
            )
        if not self.config.has_null_class and int(class_labels.min()) < 0:
            raise ValueError(
                "This model was trained without null class: it needs a class for every picture, and cannot be guided."
            )

    def null_condition(self, batch_size: int, mask: torch.Tensor | None = None) -> Prompt:
        """The condition of unconditional rows."""
        device = self.input_device
        if self.config.condition_type == "class":
            return self.condition(torch.full((batch_size,), -1, device=device))
        null = self.model.null_text_embedding.to(self.model.norm.weight.dtype)
        return Prompt(self.model.text_projection(null).expand(batch_size, -1, -1), mask)

    def prompt(self, **inputs: torch.Tensor) -> Prompt:
        """See [`NextTokenPredictor`]."""
        return self.condition(**inputs)

    def null_prompt(self, prompt: Prompt) -> Prompt:
        """The unconditional counterpart: padded where the caption is, as in the authors' code."""
        return self.null_condition(len(prompt.embeds), prompt.mask)

    # The passes

    def next_logits(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 1,
    ) -> torch.Tensor:
        """Logits (rows, logits_to_keep, vocab_size) float32 of what follows the last positions."""
        hidden_states = self.model(
            input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, return_dict=False
        )[0]
        return self.head(hidden_states[:, -logits_to_keep:])

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        prompt_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        valid: torch.Tensor | None = None,
        return_loss: bool = True,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
    ) -> LlamaGenOutput | tuple:
        """
        Teacher-forced pass over a picture, or over its first few tokens.

        Args:
            input_ids: (batch, tokens), the ids row by row.
            class_labels: (batch,) class of each picture, -1 for none.
            prompt_embeds, prompt_ids, prompt_attention_mask: see `condition`.
            pixel_values: (batch, channels, height, width) in [-1, 1], tokenized here, instead of `input_ids`.
            labels: (batch, tokens) the ids to predict, normally `input_ids` themselves (position i predicts token
                i); -100 does not count. With `pixel_values` they are known already.
            valid: (batch,) weight of each row in the loss, for data sets with damaged rows.
            return_loss: with `pixel_values` and no `labels`, also compute the loss.

        Raises:
            ValueError: neither or both of ids and pixels, a condition that is missing, a shape that does not fit.
        """
        input_ids, labels = self.ids_and_labels(input_ids, pixel_values, labels, return_loss)
        if input_ids.ndim != 2 or not 1 <= input_ids.shape[1] <= self.config.num_image_tokens:
            raise ValueError(
                f"input_ids have the shape {tuple(input_ids.shape)}; pictures of this model have "
                f"{self.config.num_image_tokens} tokens, so it must be (batch, 1 to {self.config.num_image_tokens})."
            )
        drop = self._draw_dropped_conditions(input_ids.shape[0], input_ids.device)
        prompt = self.condition(class_labels, prompt_embeds, prompt_ids, prompt_attention_mask, drop)
        embeds = torch.cat([prompt.embeds, self.model.embed_tokens(input_ids[:, :-1])], dim=1)
        mask = None
        if prompt.mask is not None or self.config._attn_implementation == "eager":
            hidden = None if prompt.mask is None else prompt.mask == 0
            mask = causal_mask(embeds.shape[1], hidden, embeds.dtype, embeds.device)
        outputs = self.model(
            inputs_embeds=embeds, attention_mask=mask, output_hidden_states=output_hidden_states
        )
        logits = self.head(outputs.last_hidden_state[:, -input_ids.shape[1] :])
        loss = None if labels is None else self._loss(logits, labels, valid)
        output = LlamaGenOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return output if return_dict is not False else output.to_tuple()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        if valid is None:
            return self.head.cross_entropy(logits, labels)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        weights = valid[:, None].to(losses.dtype) * (labels != -100)
        return (losses * weights).sum() / weights.sum().clamp(min=1)

    def _draw_dropped_conditions(self, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """Rows whose condition is dropped; one draw per row from the global generator, as the authors' code does."""
        if not self.training or self.config.condition_dropout == 0:
            return None
        return torch.rand(batch_size, device=device) < self.config.condition_dropout


def words_last(embeds: torch.Tensor, mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Caption embeddings (batch, tokens, dim) moved so that their words stand last among `length` positions, in their
    order, zeros before them; and the mask (batch, length) of that.
    """
    missing = length - embeds.shape[1]
    embeds, mask = F.pad(embeds, (0, 0, missing, 0)), F.pad(mask, (missing, 0))
    order = mask.argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    embeds = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
    return embeds * mask.unsqueeze(-1).to(embeds.dtype), mask
