"""RAR: next-token prediction that is trained on permuted orders and draws in raster order (arXiv 2411.00776)."""

import random
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ...generation import sampling
from ...generation.mixin import ImageGenerationMixin
from ...generation.predictors.next_token import NextTokenPredictor, Prompt
from ...generation.sampling import Generators
from ...kernels.adaln import gated_residual
from ..base import ArgenPreTrainedModel, ImageModelMixin
from ..heads.categorical import CategoricalHead
from ..layers.attention import HeadedAttention, causal_mask, fused_layer_norms
from ..layers.mlp import MLP
from ..layers.modulation import AdaLNModulation, AdaLNOutput, ModulatedLayerNorm
from ..tokenizers.configuration_grid import check_same_tokens
from ..vector_condition import VectorConditionMixin, VectorConditionModules
from .configuration_rar import RarConfig

PREFIX = 2  # positions before the first image token: class token and condition
NUM_MODULATIONS = 6  # shifts, scales and gates of the attention and the feed-forward block


@dataclass
class RarOutput(ModelOutput):
    """
    Output of the teacher-forced pass.

    Attributes:
        loss: mean cross-entropy over tokens and batch, scalar float32.
        logits: (batch, tokens, vocab_size) float32; position i is the prediction of the i-th token of the order.
        orders: (batch, tokens) int64, where in the picture the i-th token of the order stands; `None` for raster order.
        hidden_states: with `output_hidden_states`, the input of the first layer and the output of every layer, class token
            and condition included.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    orders: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class RarAttention(HeadedAttention):
    """Multi-head self-attention with a layer norm on every query and key."""

    def __init__(self, config: RarConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.is_causal = True
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm = nn.LayerNorm(self.head_dim, config.layer_norm_eps)
        self.k_norm = nn.LayerNorm(self.head_dim, config.layer_norm_eps)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        query, key, value = self.heads(hidden_states)
        query_norm, key_norm = self._modules["q_norm"], self._modules["k_norm"]  # see `linears`
        fused = fused_layer_norms(query, query_norm, key_norm)
        if not fused:
            query, key = query_norm(query), key_norm(key)
        return self.attend(query, key, value, attention_mask, past_key_values, **fused)


class RarLayer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each normalised, modulated and gated by the condition of every position."""

    def __init__(self, config: RarConfig, layer_idx: int):
        super().__init__()
        hidden = config.hidden_size
        self.modulation = AdaLNModulation(hidden, hidden, NUM_MODULATIONS)
        self.input_layernorm = ModulatedLayerNorm(hidden, config.layer_norm_eps)
        self.self_attn = RarAttention(config, layer_idx)
        self.post_attention_layernorm = ModulatedLayerNorm(hidden, config.layer_norm_eps)
        dropout = config.hidden_dropout
        self.mlp = MLP(hidden, config.intermediate_size, config.hidden_act, dropout, inner_dropout=dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditions: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        parts = self._modules  # see `linears`
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts["modulation"](
            conditions
        ).unbind(2)
        normed, _ = parts["input_layernorm"](hidden_states, scale_attn, shift_attn)
        attended = parts["self_attn"](normed, attention_mask, past_key_values)
        normed, hidden_states = parts["post_attention_layernorm"](
            hidden_states, scale_mlp, shift_mlp, attended, gate_attn
        )
        return gated_residual(hidden_states, parts["mlp"](normed), gate_mlp)


class RarPreTrainedModel(ArgenPreTrainedModel):
    """Weight initialisation and switches of the family."""

    config: RarConfig
    config_class = RarConfig
    base_model_prefix = "model"
    main_input_name = "class_labels"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RarLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules = ["image_tokenizer", "text_projection", "head.out_proj"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    reads_trees = True  # its attention takes a TreeView of the cache in place of a mask

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' scheme: modulations and the class token zero, so that every layer starts as the identity."""
        std = self.config.initializer_range
        if isinstance(module, AdaLNModulation | AdaLNOutput):
            init.zeros_(module.linear.weight)
            init.zeros_(module.linear.bias)
        elif isinstance(module, RarModel):
            init.zeros_(module.cls_embedding.weight)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class RarModel(VectorConditionModules, RarPreTrainedModel):
    """
    The transformer without head. A sequence is a class token, the condition, and the tokens of a picture in any order;
    every position is told where its token stands and where the one stands that it predicts.
    """

    parts_of_larger_models = ("head.", "image_tokenizer.")

    def __init__(self, config: RarConfig):
        super().__init__(config)
        hidden, tokens = config.hidden_size, config.num_image_tokens
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.add_condition_modules(config)
        self.cls_embedding = nn.Embedding(1, hidden)
        self.position_embedding = nn.Embedding(PREFIX + tokens, hidden)
        self.target_position_embedding = nn.Embedding(tokens, hidden)
        self.step_embedding = nn.Embedding(PREFIX + tokens, hidden)
        self.layers = nn.ModuleList(RarLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = AdaLNOutput(hidden, hidden, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    @property
    def dtype_of_computation(self) -> torch.dtype:
        """See [`VectorConditionModules`]."""
        return self.position_embedding.weight.dtype

    def prefix(self, condition: torch.Tensor) -> torch.Tensor:
        """Class token and condition (batch, hidden_size) as (batch, 2, hidden_size), without positions."""
        rows = torch.zeros(len(condition), 1, dtype=torch.long, device=condition.device)
        return torch.cat([self.cls_embedding(rows), condition.unsqueeze(1)], dim=1)

    def embed_positions(self, position_ids: torch.Tensor, orders: torch.Tensor | None) -> torch.Tensor:
        """What tells each position where its token stands and which is the next, (rows, n, hidden_size)."""
        target = position_ids - (PREFIX - 1)  # the token that a position predicts, by its place in the order
        most = self.config.num_image_tokens
        if orders is None:
            own = position_ids
        else:
            most = orders.shape[1]
            places = orders.gather(1, (position_ids - PREFIX).clamp(min=0).expand(len(orders), -1))
            own = torch.where(position_ids < PREFIX, position_ids, PREFIX + places)
        has_target = (target >= 0) & (target < most)
        target = target.clamp(0, most - 1)
        if orders is not None:
            target = orders.gather(1, target.expand(len(orders), -1))
        told = self.target_position_embedding(target)
        return self.position_embedding(own) + told * has_target.unsqueeze(-1).to(told.dtype)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        condition: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        orders: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutput | tuple:
        """
        Args:
            input_ids: (batch, n) image tokens in their order; or `inputs_embeds` (batch, n, hidden_size) in their place,
                without positions.
            condition: (batch, hidden_size), from `class_condition` or `text_condition`.
            attention_mask: additive, (batch or 1, 1, n, positions); `None`: plain causal without cache, all that the
                cache holds with one.
            position_ids: (batch or 1, n), counted from the class token; default: from 0.
            orders: (batch, tokens), where in the picture the tokens of the order stand; default: row by row.
            past_key_values: keys and values of earlier positions.

        Returns:
            `last_hidden_state` (batch, n, hidden_size) after the final norm.
        """
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        hidden_states = hidden_states + self.embed_positions(position_ids, orders)
        conditions = condition.unsqueeze(1) + self.step_embedding(position_ids)
        all_hidden_states = (hidden_states,)
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditions, attention_mask, past_key_values)
            all_hidden_states += (hidden_states,)
        output = (
            self.norm(hidden_states, conditions),
            *([all_hidden_states] if output_hidden_states else []),
        )
        return BaseModelOutput(*output) if return_dict else output


class RarForImageGeneration(ImageModelMixin, VectorConditionMixin, RarPreTrainedModel, ImageGenerationMixin):
    """
    RAR with head and visual tokenizer: training on permuted orders, and generation row by row.

    >>> model = RarForImageGeneration.from_original("yucornetto/RAR", variant="b")
    >>> images = model.decode_images(model.generate(class_labels=[207, 980], guidance_scale=4.0))
    """

    predictor_class = NextTokenPredictor
    neutral_guidance_scale = 1.0
    _tp_plan = {"head.out_proj": "colwise_gather_output"}

    def __init__(self, config: RarConfig):
        super().__init__(config)
        self.model = RarModel(config)
        self.head = CategoricalHead(config.hidden_size, config.vocab_size)
        self.image_tokenizer = self.build_image_tokenizer(config.image_tokenizer_config)
        self.randomness_ratio = config.randomness_ratio
        self.post_init()

    def check_tokenizer_fits(self, config: PreTrainedConfig) -> None:
        """Refuses a tokenizer of other codes or another grid; one that takes pictures of any size gets the grid."""
        check_same_tokens(self.config, config)

    def set_randomness_ratio(self, ratio: float) -> None:
        """
        The share of training rows whose tokens are put in random order from now on, in [0, 1].

        The paper anneals it from 1 to 0: see [`hf_argen.training.RandomnessAnnealing`]. In evaluation mode the order is
        always that of the rows of the picture.
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"The randomness ratio is {ratio}; it must lie in [0, 1].")
        self.randomness_ratio = float(ratio)

    # Generation; see NextTokenPredictor

    def draw_ahead(self, batch_size: int, generator: Generators) -> None:
        # The authors decide for each row whether to drop its class, with probability 0.
        sampling.bernoulli(torch.zeros(batch_size, device=self.input_device), generator)

    def prompt(self, **inputs: torch.Tensor) -> Prompt:
        """Class token and condition; the condition goes along to every position."""
        return self._prompt(self.condition(**inputs))

    def null_prompt(self, prompt: Prompt) -> Prompt:
        """The unconditional counterpart."""
        return self._prompt(self.null_condition(len(prompt.embeds)))

    def _prompt(self, condition: torch.Tensor) -> Prompt:
        return Prompt(self.model.prefix(condition), context={"condition": condition})

    def next_logits(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 1,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (rows, logits_to_keep, vocab_size) float32 of what follows the last positions."""
        given = (input_ids, inputs_embeds, condition, attention_mask, position_ids)
        hidden_states = self.model(*given, past_key_values=past_key_values, return_dict=False)[0]
        return self.head(hidden_states[:, -logits_to_keep:])

    # Training

    def sample_orders(self, batch_size: int, tokens: int, device: torch.device) -> torch.Tensor:
        """
        An order of the tokens for each row, (batch_size, tokens) int64: random for a share `randomness_ratio` of them, the
        rest row by row. Drawn as by the authors: Python's `random` decides, torch permutes.
        """
        raster = torch.arange(tokens, device=device)
        orders = [
            torch.randperm(tokens, device=device) if random.random() < self.randomness_ratio else raster
            for _ in range(batch_size)
        ]
        return torch.stack(orders)

    def draw_dropped_conditions(self, batch_size: int, device: torch.device) -> torch.Tensor:
        """Rows whose condition is dropped in training, (batch_size,) bool; drawn as by the authors, before the orders."""
        return torch.rand(batch_size, device=device) < self.config.condition_dropout

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        prompt_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        orders: torch.LongTensor | None = None,
        return_loss: bool = True,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
    ) -> RarOutput | tuple:
        """
        Teacher-forced pass over a picture, or over its first few tokens.

        Args:
            input_ids: (batch, tokens), the ids row by row.
            class_labels: (batch,) class of each picture, -1 for none.
            prompt_embeds, prompt_ids, prompt_attention_mask: see `condition`.
            pixel_values: (batch, channels, height, width) in [-1, 1], tokenized here, instead of `input_ids`.
            labels: (batch, tokens) the ids to predict, row by row, normally `input_ids` themselves; -100 does not count.
                With `pixel_values` they are known already.
            orders: (batch, tokens), a permutation of the tokens for each row; default: in training mode drawn by
                `sample_orders`, in evaluation mode row by row.
            return_loss: with `pixel_values` and no `labels`, also compute the loss.

        Raises:
            ValueError: neither or both of ids and pixels, a condition that is missing, a shape that does not fit.
        """
        input_ids, labels = self.ids_and_labels(input_ids, pixel_values, labels, return_loss)
        self._check_ids(input_ids, labels, orders)
        drop = self.draw_dropped_conditions(len(input_ids), input_ids.device) if self.training else None
        condition = self.condition(class_labels, prompt_embeds, prompt_ids, prompt_attention_mask, drop)
        if len(condition) != len(input_ids):
            raise ValueError(f"There are {len(condition)} conditions for {len(input_ids)} pictures.")
        if orders is None and self.training:
            orders = self.sample_orders(*input_ids.shape, input_ids.device)
        if orders is not None:
            input_ids = input_ids.gather(1, orders)
            labels = None if labels is None else labels.gather(1, orders)
        embeds = torch.cat([self.model.prefix(condition), self.model.embed_tokens(input_ids[:, :-1])], dim=1)
        mask = None
        if self.config._attn_implementation == "eager":
            mask = causal_mask(embeds.shape[1], None, embeds.dtype, embeds.device)
        outputs = self.model(
            inputs_embeds=embeds,
            condition=condition,
            attention_mask=mask,
            orders=orders,
            output_hidden_states=output_hidden_states,
        )
        logits = self.head(outputs.last_hidden_state[:, PREFIX - 1 :])
        loss = None if labels is None else self.head.cross_entropy(logits, labels)
        output = RarOutput(loss=loss, logits=logits, orders=orders, hidden_states=outputs.hidden_states)
        return output if return_dict is not False else output.to_tuple()

    def _check_ids(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None, orders: torch.Tensor | None
    ) -> None:
        tokens = self.config.num_image_tokens
        if input_ids.ndim != 2 or not 1 <= input_ids.shape[1] <= tokens:
            raise ValueError(
                f"input_ids have the shape {tuple(input_ids.shape)}; pictures of this model have {tokens} tokens, so it "
                f"must be (batch, 1 to {tokens})."
            )
        for name, value in {"labels": labels, "orders": orders}.items():
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} have the shape {tuple(value.shape)}; the ids have {tuple(input_ids.shape)}."
                )
        if orders is not None:
            places = torch.arange(input_ids.shape[1], device=orders.device)
            if not torch.equal(orders.sort(dim=1).values, places.expand_as(orders)):
                raise ValueError(
                    f"orders must be permutations of 0 to {input_ids.shape[1] - 1} in every row."
                )
