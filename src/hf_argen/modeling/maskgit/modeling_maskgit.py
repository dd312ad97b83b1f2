"""MaskGIT: a transformer that sees a picture's known ids from both sides and predicts the hidden ones (arXiv 2202.04200)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ...generation import sampling
from ...generation.guidance import Guidance, GuidanceSchedule, PowerCosine
from ...generation.mixin import ImageGenerationMixin
from ...generation.predictors.masked_ids import MaskedIdPredictor
from ...generation.sampling import Generators
from ..base import ArgenPreTrainedModel, ImageModelMixin
from ..heads.categorical import CategoricalHead
from ..layers.postnorm import PostNormLayer
from ..layers.prenorm import LongSkipLayer, PreNormLayer
from ..masked_training import MaskedIdTrainingMixin
from ..vector_condition import VectorConditionMixin, VectorConditionModules
from .configuration_maskgit import MaskGitConfig, check_tokens

LAYERS = {"bert": ["PostNormLayer"], "uvit": ["PreNormLayer", "LongSkipLayer"]}
DEFAULT_STEPS, DEFAULT_NOISE = 8, 4.5  # of the authors' sampler


@dataclass
class MaskGitOutput(ModelOutput):
    """
    Output of the teacher-forced pass.

    Attributes:
        loss: weighted mean cross-entropy, hidden tokens first, scalar float32.
        logits: (batch, tokens, vocab_size) float32.
        mask: (batch, tokens) bool, the hidden ones.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    mask: torch.BoolTensor | None = None


class MaskGitPreTrainedModel(ArgenPreTrainedModel):
    """Weight initialisation and switches of the family."""

    config: MaskGitConfig
    config_class = MaskGitConfig
    base_model_prefix = "model"
    main_input_name = "class_labels"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["image_tokenizer", "text_projection", "head.out_proj"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    def __init__(self, config: MaskGitConfig):
        super().__init__(config)
        # FSDP asks for every class by name and refuses those that the model does not have.
        self._no_split_modules = LAYERS[config.architecture]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' schemes: BERT's, and for the other form one without outliers."""
        draw = init.normal_ if self.config.architecture == "bert" else init.trunc_normal_
        if isinstance(module, nn.Linear | nn.Embedding):
            draw(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MaskGitModel(VectorConditionModules, MaskGitPreTrainedModel):
    """The transformer without head. A sequence is the condition and the tokens of a picture, a mask token for hidden ones."""

    parts_of_larger_models = ("head.", "image_tokenizer.")

    def __init__(self, config: MaskGitConfig):
        super().__init__(config)
        hidden, depth = config.hidden_size, config.num_hidden_layers
        sizes = (hidden, config.num_attention_heads, config.intermediate_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.mask_embedding = nn.Embedding(1, hidden)
        self.add_condition_modules(config)
        self.position_embedding = nn.Embedding(1 + config.num_image_tokens, hidden)
        if config.architecture == "bert":
            self.token_type_embedding = nn.Embedding(1, hidden)
            self.embed_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
            self.embed_dropout = nn.Dropout(config.hidden_dropout)
            self.layers = nn.ModuleList(PostNormLayer(config, *sizes) for _ in range(depth))
        else:
            half = range(depth // 2)
            self.in_layers = nn.ModuleList(PreNormLayer(config, *sizes, qkv_bias=False) for _ in half)
            self.mid_layer = PreNormLayer(config, *sizes, qkv_bias=False)
            self.out_layers = nn.ModuleList(LongSkipLayer(config, *sizes, qkv_bias=False) for _ in half)
            self.norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @property
    def dtype_of_computation(self) -> torch.dtype:
        """See [`VectorConditionModules`]."""
        return self.position_embedding.weight.dtype

    @property
    def mask_id(self) -> int:
        """The id of hidden tokens, one after the last code."""
        return self.config.vocab_size

    def forward(
        self, input_ids: torch.LongTensor, condition: torch.FloatTensor, return_dict: bool = True
    ) -> BaseModelOutput | tuple:
        """
        Args:
            input_ids: (batch, tokens), `mask_id` where a token is hidden.
            condition: (batch, hidden_size), from `class_condition` or `text_condition`.

        Returns:
            `last_hidden_state` (batch, tokens, hidden_size).
        """
        is_hidden = input_ids == self.mask_id
        embedded = self.embed_tokens(input_ids.masked_fill(is_hidden, 0))
        masked = self.mask_embedding(torch.zeros_like(input_ids[:1, :1]))
        embedded = torch.where(is_hidden.unsqueeze(-1), masked, embedded)
        hidden_states = torch.cat([condition.unsqueeze(1).to(embedded.dtype), embedded], dim=1)
        places = torch.arange(hidden_states.shape[1], device=input_ids.device)
        hidden_states = hidden_states + self.position_embedding(places)
        through = self._through_bert if self.config.architecture == "bert" else self._through_uvit
        output = BaseModelOutput(last_hidden_state=through(hidden_states)[:, 1:])
        return output if return_dict else output.to_tuple()

    def _through_bert(self, hidden_states: torch.Tensor) -> torch.Tensor:
        first = torch.zeros(1, dtype=torch.long, device=hidden_states.device)
        hidden_states = hidden_states + self.token_type_embedding(first)
        hidden_states = self.embed_dropout(self.embed_norm(hidden_states))
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states

    def _through_uvit(self, hidden_states: torch.Tensor) -> torch.Tensor:
        skipped = []
        for layer in self.in_layers:
            hidden_states = layer(hidden_states)
            skipped.append(hidden_states)
        hidden_states = self.mid_layer(hidden_states)
        for layer in self.out_layers:
            hidden_states = layer(hidden_states, skipped.pop())
        return self.norm(hidden_states)


class MaskGitForImageGeneration(
    MaskedIdTrainingMixin, ImageModelMixin, VectorConditionMixin, MaskGitPreTrainedModel, ImageGenerationMixin
):
    """
    MaskGIT with head and visual tokenizer: training on masked pictures, and generation of the surest tokens first.

    >>> model = hf_argen.convert_original("titok", {"generator": "generator_titok_l32.bin", "tokenizer": "tokenizer_titok_l32.bin"})
    >>> images = model.decode_images(model.generate(class_labels=[207, 980]))
    """

    predictor_class = MaskedIdPredictor
    _tp_plan = {"head.out_proj": "colwise_gather_output"}

    def __init__(self, config: MaskGitConfig):
        super().__init__(config)
        self.model = MaskGitModel(config)
        self.head = CategoricalHead(config.hidden_size, config.vocab_size)
        self.image_tokenizer = self.build_image_tokenizer(config.image_tokenizer_config)
        self.generation_config.decoding = {
            "type": "masked",
            "num_steps": min(DEFAULT_STEPS, self.model.position_embedding.num_embeddings - 1),
            "order": "confidence",
            "schedule": "arccos",
            "randomize_temperature": DEFAULT_NOISE,
        }
        self.post_init()

    def check_tokenizer_fits(self, config: PreTrainedConfig) -> None:
        """Refuses a tokenizer of other codes or another number of tokens."""
        check_tokens(self.config, config)

    # Ids and tokens

    def to_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (batch, tokens) as tokens of one number, (batch, tokens, 1)."""
        return ids.unsqueeze(-1)

    def from_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_tokens`."""
        return tokens.squeeze(-1)

    # Generation; see MaskedIdPredictor

    def _guidance(self, config: GenerationConfig, schedule: GuidanceSchedule | None) -> Guidance:
        """In the authors' code the scale counts from 1 with the schedule power_cosine, and from 0 with the others."""
        guidance = super()._guidance(config, schedule)
        if isinstance(guidance.factor, PowerCosine):
            return Guidance(guidance.scale, guidance.schedule, neutral=1.0)
        return guidance

    def draw_ahead_of_step(self, batch_size: int, passes: int, generator: Generators) -> None:
        # The authors decide in every pass for each row whether to drop its class, with probability 0 or 1.
        for _ in range(passes):
            sampling.bernoulli(torch.zeros(batch_size, device=self.input_device), generator)

    def conditions(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """What the pictures shall show, as keywords of the model's `forward`; see `condition`."""
        return {"condition": self.condition(**inputs)}

    def null_conditions(self, conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The conditions of unconditional rows."""
        return {"condition": self.null_condition(len(conditions["condition"]))}

    def masked_hidden_states(
        self,
        tokens: torch.Tensor,
        visible: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        valid: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        What the head draws from at every place, (rows, tokens, hidden_size).

        Args:
            tokens: (rows, n, 1) int64, the known ones.
            visible: (rows, n), their places; the number of tokens where a shorter row is padded.
            valid: not needed.
        """
        rows, capacity = len(tokens), self.config.num_image_tokens
        ids = torch.full((rows, capacity + 1), self.model.mask_id, device=tokens.device)
        ids = ids.scatter(1, visible, self.from_tokens(tokens))[:, :capacity]
        return self.model(ids, **conditions).last_hidden_state

    # Training

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        prompt_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        mask: torch.BoolTensor | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> MaskGitOutput | tuple:
        """
        Pass over a picture of which some tokens are hidden.

        Args:
            input_ids: (batch, tokens), all ids of the picture.
            class_labels: (batch,) class of each picture, -1 for none.
            prompt_embeds, prompt_ids, prompt_attention_mask: see `condition`.
            pixel_values: (batch, channels, height, width) in [-1, 1], tokenized here, instead of `input_ids`.
            labels: (batch, tokens) the ids to predict, normally `input_ids` themselves; -100 does not count. With
                `pixel_values` they are known already.
            mask: (batch, tokens), nonzero at the tokens that are hidden; default: `draw_mask`.
            return_loss: with `pixel_values` and no `labels`, also compute the loss.

        Raises:
            ValueError: neither or both of ids and pixels, a condition that is missing, a mask that hides nothing, a shape
                that does not fit.
        """
        input_ids, labels = self.ids_and_labels(input_ids, pixel_values, labels, return_loss)
        self._check_ids(input_ids, labels)
        batch, device = len(input_ids), input_ids.device
        mask = self.draw_mask(batch, device) if mask is None else self.checked_mask(mask, batch)
        drop = self.draw_dropped_conditions(batch, device) if self.training else None
        condition = self.condition(class_labels, prompt_embeds, prompt_ids, prompt_attention_mask, drop)
        if len(condition) != batch:
            raise ValueError(f"There are {len(condition)} conditions for {batch} pictures.")
        hidden_states = self.model(input_ids.masked_fill(mask, self.model.mask_id), condition)
        logits = self.head(hidden_states.last_hidden_state)
        loss = None
        if labels is not None:
            own = self.config
            loss = self.head.masked_loss(logits, labels, mask, own.label_smoothing, own.known_token_weight)
        output = MaskGitOutput(loss=loss, logits=logits, mask=mask)
        return output if return_dict is not False else output.to_tuple()

    def _check_ids(self, input_ids: torch.Tensor, labels: torch.Tensor | None) -> None:
        tokens = self.config.num_image_tokens
        for name, value in {"input_ids": input_ids, "labels": labels}.items():
            if value is not None and (value.ndim != 2 or value.shape[1] != tokens):
                raise ValueError(
                    f"{name} have the shape {tuple(value.shape)}; pictures of this model have {tokens} tokens, so it must be "
                    f"(batch, {tokens})."
                )
