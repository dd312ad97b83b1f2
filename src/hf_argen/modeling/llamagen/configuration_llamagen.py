"""Configuration of LlamaGen."""

import math
from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..config_checks import check_positive, check_shares
from ..layers.sub_config import as_config
from ..tokenizers.configuration_grid import as_sides, complete_from_tokenizer
from ..tokenizers.llamagen_vq.configuration_llamagen_vq import LlamaGenVQConfig


class LlamaGenConfig(PreTrainedConfig):
    r"""
    Configuration of [`LlamaGenForImageGeneration`] (LlamaGen, arXiv 2406.06525). The defaults are the released
    class-conditional GPT-B at 256 px.

    Args:
        image_tokenizer_config: configuration of the visual tokenizer, by default that of VQ-16; `None` builds a model
            without tokenizer.
        vocab_size: codes; taken from the tokenizer where not given.
        grid_size: side of the token grid, or `[height, width]`; by default the tokenizer's, or else 16.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: the transformer;
            `intermediate_size` is by default 8/3 of `hidden_size`, rounded up to a multiple of 256.
        rms_norm_eps: of all norms.
        rope_theta: base of the 2-D rotary embedding.
        embedding_dropout, attention_dropout, residual_dropout, mlp_dropout, drop_path_rate: in training; the drop path
            grows linearly with depth.
        condition_type: "class" or "text".
        num_classes: classes of a class-conditional model.
        has_null_class: whether a null class of guidance comes after them.
        text_embed_dim: width of the caption embeddings of a text-conditional model (2048 for FLAN-T5-XL).
        max_prompt_tokens: caption embeddings before the first image token.
        text_encoder_config: configuration of a T5 encoder inside the model; `None` when embeddings are given as
            `prompt_embeds`.
        freeze_text_encoder: whether that encoder is a finished one, computed without gradients as in the authors'
            training, or trains with the rest.
        condition_dropout: share of training rows whose condition is replaced by the null condition.
        initializer_range: standard deviation of the weights.
    """

    model_type = "llamagen"
    sub_configs = {"image_tokenizer_config": AutoConfig, "text_encoder_config": AutoConfig}

    image_tokenizer_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    vocab_size: int | None = None
    grid_size: int | list[int] | tuple[int, ...] | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.0
    residual_dropout: float = 0.1
    mlp_dropout: float = 0.1
    drop_path_rate: float = 0.0
    condition_type: str = "class"
    num_classes: int = 1000
    has_null_class: bool = True
    text_embed_dim: int = 2048
    max_prompt_tokens: int = 120
    text_encoder_config: dict | PreTrainedConfig | None = None
    freeze_text_encoder: bool = True
    condition_dropout: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.image_tokenizer_config = as_config(self.image_tokenizer_config, LlamaGenVQConfig)
        self.text_encoder_config = as_config(self.text_encoder_config)
        complete_from_tokenizer(self, codebook_size=16384, grid_size=16)
        if self.intermediate_size is None:
            self.intermediate_size = 256 * math.ceil(int(8 * self.hidden_size / 3) / 256)
        self._check()
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = self._tensor_parallel_plan()

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How transformers splits the modules of [`LlamaGenModel`] over devices; attention is split by heads."""
        columns = [f"layers.*.self_attn.{name}_proj" for name in "qkv"]
        columns += ["layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"]
        rows = ["layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"]
        if self.condition_type == "text":
            columns.append("text_projection.fc1")
            rows.append("text_projection.fc2")
        return dict.fromkeys(columns, "colwise") | dict.fromkeys(rows, "rowwise")

    def _check(self) -> None:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        check_positive(self, (*sizes, "num_classes", "text_embed_dim", "max_prompt_tokens"))
        dropouts = ("embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout")
        check_shares(self, (*dropouts, "drop_path_rate", "condition_dropout"))
        if self.condition_type not in ("class", "text"):
            raise ValueError(f"condition_type is {self.condition_type!r}; it must be 'class' or 'text'.")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_attention_heads={self.num_attention_heads} gives no head width "
                "that is a multiple of 4, which the 2-D rotary embedding needs."
            )

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the token grid, as a list of one."""
        return [as_sides(self.grid_size)]

    @property
    def num_image_tokens(self) -> int:
        """Tokens of a picture."""
        height, width = as_sides(self.grid_size)
        return height * width

    @property
    def prefix_length(self) -> int:
        """Positions of the condition before the first image token."""
        return 1 if self.condition_type == "class" else self.max_prompt_tokens

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads
