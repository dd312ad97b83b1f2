"""VAR: next-scale prediction over the token grids of a multi-scale VQ-VAE (arXiv 2404.02905)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from ...generation.mixin import ImageGenerationMixin
from ...generation.predictors.next_scale import NextScalePredictor
from ...kernels.adaln import adaln, gated_residual
from ..base import ArgenPreTrainedModel, ImageModelMixin
from ..heads.categorical import CategoricalHead
from ..layers.attention import HeadedAttention, block_causal_mask, block_index, local_part
from ..layers.drop_path import DropPath
from ..layers.mlp import MLP
from ..layers.modulation import AdaLNModulation, AdaLNOutput, AdaLNTable, modulated_norm
from ..tokenizers.multiscale_vq.configuration_multiscale_vq import MultiScaleVQConfig
from ..vector_condition import VectorConditionMixin, VectorConditionModules
from .configuration_var import VarConfig

NUM_MODULATIONS = 6  # gates, scales and shifts of the attention and the feed-forward block


@dataclass
class VarOutput(ModelOutput):
    """
    Output of the teacher-forced pass.

    Attributes:
        loss: mean cross-entropy over tokens and batch, scalar float32.
        logits: (batch, tokens, vocab_size) float32; position i is the prediction of token i.
        hidden_states: with `output_hidden_states`, the input of the first layer and the output of every layer.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class VarAttention(HeadedAttention):
    """Multi-head self-attention; with `use_qk_norm`, cosine similarities times a learned factor per head."""

    MAX_LOGIT_SCALE = math.log(100)

    def __init__(self, config: VarConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.is_causal = False  # the block-causal mask is explicit
        self.scaling = 1.0 if config.use_qk_norm else 0.25 / math.sqrt(self.head_dim)
        if config.use_qk_norm:
            self.logit_scale = nn.Parameter(torch.empty(config.num_attention_heads))
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        query, key, value = self.heads(hidden_states)
        if not self.config.use_qk_norm:
            return self.attend(query, key, value, attention_mask, past_key_values)
        factor = local_part(self.logit_scale).clamp(max=self.MAX_LOGIT_SCALE).exp()
        return self.attend(
            query, key, value, attention_mask, past_key_values, norm="l2", eps=1e-12, query_scale=factor
        )


class VarLayer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each normalised, modulated and gated by the condition."""

    def __init__(self, config: VarConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.eps = config.layer_norm_eps
        hidden = config.hidden_size
        if config.shared_adaln:
            self.modulation = AdaLNTable(hidden, NUM_MODULATIONS)
        else:
            self.modulation = AdaLNModulation(hidden, hidden, NUM_MODULATIONS)
        self.self_attn = VarAttention(config, layer_idx)
        self.mlp = MLP(hidden, config.intermediate_size, config.hidden_act, config.hidden_dropout)
        depth = max(config.num_hidden_layers - 1, 1)
        self.drop_path = DropPath(config.drop_path_rate * layer_idx / depth)

    def forward(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        modulation = remembered(past_key_values, ("modulation", self.layer_idx), self.modulation, condition)
        gate_attn, gate_mlp, scale_attn, scale_mlp, shift_attn, shift_mlp = modulation.unsqueeze(1).unbind(2)
        attended = self.self_attn(
            modulated_norm(hidden_states, scale_attn, shift_attn, self.eps), attention_mask, past_key_values
        )
        normed, hidden_states = adaln(
            hidden_states, scale_mlp, shift_mlp, self.eps, update=self.drop_path(attended), gate=gate_attn
        )
        return gated_residual(hidden_states, self.drop_path(self.mlp(normed)), gate_mlp)


def remembered(cache: Cache | None, key: Any, module: nn.Module, condition: torch.Tensor) -> torch.Tensor:
    """`module(condition)`, computed once per generation where the cache keeps it: no scale changes the condition."""
    if cache is None or not hasattr(cache, "remember"):
        return module(condition)
    return cache.remember(key, lambda: module(condition))


class VarPreTrainedModel(ArgenPreTrainedModel):
    """Weight initialisation and switches of the family."""

    config: VarConfig
    config_class = VarConfig
    base_model_prefix = "model"
    main_input_name = "class_labels"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VarLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules = ["image_tokenizer", "text_projection", "head.out_proj"]  # docs/scaling.md
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' scheme: residual branches start small, gates near zero, the head near uniform."""
        config = self.config
        std = config.initializer_range or math.sqrt(1 / (3 * config.hidden_size))
        residual_std = std / math.sqrt(2 * config.num_hidden_layers)
        if isinstance(module, VarAttention):
            if config.use_qk_norm:
                init.constant_(module.logit_scale, math.log(4.0))
            init.trunc_normal_(module.o_proj.weight, std=residual_std)
        elif isinstance(module, MLP):
            init.trunc_normal_(module.fc2.weight, std=residual_std)
        elif isinstance(module, AdaLNModulation):
            self._init_modulation(module.linear.weight, std)
        elif isinstance(module, AdaLNTable):
            self._init_modulation(module.table, 1 / math.sqrt(config.hidden_size))
        elif isinstance(module, AdaLNOutput):
            init.trunc_normal_(module.linear.weight, std=0.5 * std)
        elif isinstance(module, CategoricalHead):
            init.trunc_normal_(module.out_proj.weight, std=0.02 * std)
        elif isinstance(module, VarModel):
            init.trunc_normal_(module.start_embedding, std=std)
            init.trunc_normal_(module.position_embedding, std=std)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std)

    @staticmethod
    def _init_modulation(weight: torch.Tensor, std: float) -> None:
        """The first third of the rows are the gates. Slices lose the mark that a weight was loaded, hence the check."""
        if getattr(weight, "_is_hf_initialized", False):
            return
        gates = weight.shape[0] // 3
        init.trunc_normal_(weight[:gates], std=1e-5 * std)
        init.trunc_normal_(weight[gates:], std=0.5 * std)


class VarModel(VectorConditionModules, VarPreTrainedModel):
    """
    The transformer without head. A sequence is the token grids of all scales one after another; a token of a scale
    sees its whole scale and all scales before it.
    """

    parts_of_larger_models = ("head.", "image_tokenizer.")

    def __init__(self, config: VarConfig):
        super().__init__(config)
        hidden, lengths = config.hidden_size, config.scale_lengths
        self.input_projection = nn.Linear(config.codebook_dim, hidden)
        self.add_condition_modules(config)
        self.start_embedding = nn.Parameter(torch.empty(1, lengths[0], hidden))
        self.position_embedding = nn.Parameter(torch.empty(1, sum(lengths), hidden))
        self.scale_embedding = nn.Embedding(len(lengths), hidden)
        if config.shared_adaln:
            self.shared_modulation = AdaLNModulation(hidden, hidden, NUM_MODULATIONS)
        self.layers = nn.ModuleList(VarLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = AdaLNOutput(hidden, hidden, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.input_projection

    @property
    def dtype_of_computation(self) -> torch.dtype:
        """Of hidden states; a weight that no quantization touches tells, those of linear layers may be int8."""
        return self.start_embedding.dtype

    def embed(
        self, condition: torch.Tensor, features: torch.Tensor | None, start: int, stop: int
    ) -> torch.Tensor:
        """Input of the first layer for the scales `start` to `stop` - 1, (batch, tokens, hidden_size)."""
        lengths = self.config.scale_lengths
        parts = []
        if start == 0:
            parts.append(condition.unsqueeze(1) + self.start_embedding)
        if features is not None and features.shape[1]:
            parts.append(self.input_projection(features.to(self.dtype_of_computation)))
        hidden_states = torch.cat(parts, dim=1)
        place = slice(sum(lengths[:start]), sum(lengths[:stop]))
        scales = block_index(lengths, hidden_states.device)[place]
        return hidden_states + (self.scale_embedding(scales) + self.position_embedding[:, place])

    def forward(
        self,
        condition: torch.Tensor,
        features: torch.Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
        past_key_values: Cache | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutput | tuple:
        """
        Args:
            condition: (batch, hidden_size), from `class_condition` or `text_condition`.
            features: (batch, n, codebook_dim), the feature maps resized to the scales `start` to `stop` - 1, as
                `quantizer.scale_inputs` gives them; the first scale needs none, its input is the condition.
            start, stop: the scales to run; without cache they start at 0. Default: all.
            past_key_values: keys and values of the scales before `start`.

        Returns:
            `last_hidden_state` (batch, tokens, hidden_size) after the final norm.
        """
        stop = len(self.config.patch_nums) if stop is None else stop
        hidden_states = self.embed(condition, features, start, stop)
        mask = block_causal_mask(
            self.config.scale_lengths[:stop], hidden_states.dtype, hidden_states.device, start
        )
        modulation = condition
        if self.config.shared_adaln:
            modulation = remembered(past_key_values, "shared_modulation", self.shared_modulation, condition)
        all_hidden_states = (hidden_states,)
        for layer in self.layers:
            hidden_states = layer(hidden_states, modulation, mask, past_key_values)
            all_hidden_states += (hidden_states,)
        output = BaseModelOutput(
            last_hidden_state=self.norm(hidden_states, condition),
            hidden_states=all_hidden_states if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()


class VarForImageGeneration(ImageModelMixin, VectorConditionMixin, VarPreTrainedModel, ImageGenerationMixin):
    """
    VAR with categorical head and visual tokenizer: training, generation, in-painting.

    >>> model = VarForImageGeneration.from_original("FoundationVision/var", variant="d16")
    >>> images = model.decode_images(model.generate(class_labels=[207, 980], guidance_scale=4.0))
    """

    predictor_class = NextScalePredictor
    default_guidance_schedule = "linear"
    _tp_plan = {"head.out_proj": "colwise_gather_output"}

    def __init__(self, config: VarConfig):
        super().__init__(config)
        self.model = VarModel(config)
        self.head = CategoricalHead(config.hidden_size, config.vocab_size)
        self.image_tokenizer = self.build_image_tokenizer(config.image_tokenizer_config)
        self.post_init()

    def check_tokenizer_fits(self, config: MultiScaleVQConfig) -> None:
        """Refuses an image tokenizer of other scales, codes or channels."""
        pairs = {
            "patch_nums": (self.config.patch_nums, config.patch_nums),
            "vocab_size": (self.config.vocab_size, config.codebook_size),
            "codebook_dim": (self.config.codebook_dim, config.latent_channels),
        }
        for name, (own, theirs) in pairs.items():
            if own != theirs:
                raise ValueError(
                    f"{name} is {own} in the model and {theirs} in its image tokenizer; they must agree."
                )

    def scale_logits(
        self,
        condition: torch.Tensor,
        features: torch.Tensor | None,
        start: int = 0,
        stop: int | None = None,
        past_key_values: Cache | None = None,
        last_tokens: int | None = None,
    ) -> torch.Tensor:
        """Logits (batch, tokens, vocab_size) float32 of the scales `start` to `stop` - 1; see [`VarModel`]."""
        hidden_states = self.model(condition, features, start, stop, past_key_values).last_hidden_state
        if last_tokens is not None:
            hidden_states = hidden_states[:, -last_tokens:]
        return self.head(hidden_states)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        prompt_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        return_loss: bool = True,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
    ) -> VarOutput | tuple:
        """
        Teacher-forced pass over all scales, or over the first few if `input_ids` stop there.

        Args:
            input_ids: (batch, tokens), the ids of the scales one after another.
            class_labels: (batch,) class of each picture, -1 for none.
            prompt_embeds, prompt_ids, prompt_attention_mask: see `condition`.
            pixel_values: (batch, channels, height, width) in [-1, 1], tokenized here, instead of `input_ids`.
            labels: (batch, tokens) the ids to predict, normally `input_ids` themselves (position i predicts token
                i); -100 does not count. With `pixel_values` they are known already.
            return_loss: with `pixel_values` and no `labels`, also compute the loss.

        Raises:
            ValueError: neither or both of ids and pixels, a condition that is missing, a shape that does not fit.
        """
        input_ids, labels = self.ids_and_labels(input_ids, pixel_values, labels, return_loss)
        drop = self._draw_dropped_conditions(input_ids.shape[0], input_ids.device)
        condition = self.condition(class_labels, prompt_embeds, prompt_ids, prompt_attention_mask, drop)
        if condition.shape[0] != input_ids.shape[0]:
            raise ValueError(f"There are {condition.shape[0]} conditions for {input_ids.shape[0]} pictures.")
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)}; the ids have {tuple(input_ids.shape)}."
            )
        quantizer = self.check_image_tokenizer().quantizer
        num_scales = len(quantizer.split(input_ids, self.config.grid_sizes, partial=True))
        features = quantizer.scale_inputs(input_ids, self.config.grid_sizes)
        outputs = self.model(condition, features, 0, num_scales, output_hidden_states=output_hidden_states)
        logits = self.head(outputs.last_hidden_state)
        loss = (
            None if labels is None else self.head.cross_entropy(logits, labels, self.config.label_smoothing)
        )
        output = VarOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
        return output if return_dict is not False else output.to_tuple()

    def _draw_dropped_conditions(self, batch_size: int, device: torch.device) -> torch.Tensor | None:
        """Rows whose condition is dropped; one draw per row from the global generator, as the authors' code does."""
        if not (self.training or self.config.condition_dropout_in_eval):
            return None
        return torch.rand(batch_size, device=device) < self.config.condition_dropout
