"""Configuration of RAR."""

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..config_checks import check_positive, check_shares, complete_condition
from ..layers.sub_config import as_config
from ..tokenizers.configuration_grid import as_sides, complete_from_tokenizer
from ..tokenizers.maskgit_vq.configuration_maskgit_vq import MaskGitVQConfig


class RarConfig(PreTrainedConfig):
    r"""
    Configuration of [`RarForImageGeneration`] (RAR, arXiv 2411.00776). The defaults are the released RAR-B.

    Args:
        image_tokenizer_config: configuration of the visual tokenizer, by default that of the released one; any whose
            tokens are one grid will do, 'llamagen_vq' too. `None` builds a model without tokenizer.
        vocab_size: codes; taken from the tokenizer where not given.
        grid_size: side of the token grid, or `[height, width]`; by default the tokenizer's, or else 16.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: the transformer.
        layer_norm_eps: of all norms.
        hidden_dropout, attention_dropout: in training; the first of attention outputs and within the feed-forward blocks.
        randomness_ratio: share of training rows whose tokens are put in random order, at the start; see
            `set_randomness_ratio`.
        condition_type: "class" or "text".
        num_classes: classes of a class-conditional model; the null class of guidance comes after them.
        text_embed_dim: width of the pooled text embedding of a text-conditional model.
        text_encoder_config: configuration of a text encoder inside the model (any encoder of transformers); `None`
            when embeddings are given as `prompt_embeds`.
        condition_dropout: share of training rows whose condition is replaced by the null condition.
        initializer_range: standard deviation of the weights.
    """

    model_type = "rar"
    sub_configs = {"image_tokenizer_config": AutoConfig, "text_encoder_config": AutoConfig}

    image_tokenizer_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    vocab_size: int | None = None
    grid_size: int | list[int] | tuple[int, ...] | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    randomness_ratio: float = 0.0
    condition_type: str = "class"
    num_classes: int = 1000
    text_embed_dim: int | None = None
    text_encoder_config: dict | PreTrainedConfig | None = None
    condition_dropout: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.image_tokenizer_config = as_config(self.image_tokenizer_config, MaskGitVQConfig)
        self.text_encoder_config = as_config(self.text_encoder_config)
        complete_from_tokenizer(self, codebook_size=1024, grid_size=16)
        complete_condition(self)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        check_positive(self, (*sizes, "num_classes"))
        check_shares(self, ("hidden_dropout", "attention_dropout", "condition_dropout", "randomness_ratio"))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = self._tensor_parallel_plan()

    @staticmethod
    def _tensor_parallel_plan() -> dict[str, str]:
        """How transformers splits the modules of [`RarModel`] over devices; attention is split by heads."""
        plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
        # Every device applies the whole norm to its own heads, so that their gradients have to be added up.
        plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        return plan | {
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.mlp.fc1": "colwise",
            "layers.*.mlp.fc2": "rowwise",
            "layers.*.modulation.linear": "colwise_gather_output",
            "norm.linear": "colwise_gather_output",
        }

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
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads
