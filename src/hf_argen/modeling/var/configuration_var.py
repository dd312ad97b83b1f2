"""Configuration of VAR."""

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..config_checks import check_positive, check_shares, complete_condition
from ..layers.sub_config import as_config
from ..tokenizers.multiscale_vq.configuration_multiscale_vq import (
    MultiScaleVQConfig,
    grid_sizes,
    normalize_patch_nums,
)


class VarConfig(PreTrainedConfig):
    r"""
    Configuration of [`VarForImageGeneration`] (VAR, arXiv 2404.02905). The defaults are the released d16 model.

    Args:
        image_tokenizer_config: configuration of the visual tokenizer, by default that of the released one; `None`
            builds a model without tokenizer, which then has to be driven by one that has it.
        vocab_size, codebook_dim, patch_nums: codebook and scales; taken from the tokenizer where not given.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the transformer.
        hidden_act: activation of the feed-forward blocks.
        layer_norm_eps: of all norms.
        hidden_dropout, attention_dropout, drop_path_rate: in training; the drop path grows linearly with depth.
        use_qk_norm: cosine attention with a learned temperature per head; otherwise dot products are scaled by
            0.25 / sqrt(head_dim), as in the authors' code.
        shared_adaln: all blocks share one modulation and add a table of their own.
        condition_type: "class" or "text".
        num_classes: classes of a class-conditional model; the null class of guidance comes after them.
        text_embed_dim: width of the pooled text embedding of a text-conditional model.
        text_encoder_config: configuration of a text encoder inside the model (any encoder of transformers); `None`
            when embeddings are given as `prompt_embeds`.
        condition_dropout: share of training rows whose condition is replaced by the null condition.
        condition_dropout_in_eval: also in evaluation mode, as the authors' code does.
        label_smoothing: of the training loss.
        initializer_range: standard deviation of the weights; `None` for sqrt(1 / (3 hidden_size)).
    """

    model_type = "var"
    sub_configs = {"image_tokenizer_config": MultiScaleVQConfig, "text_encoder_config": AutoConfig}

    image_tokenizer_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    vocab_size: int | None = None
    codebook_dim: int | None = None
    patch_nums: list | tuple | None = None
    hidden_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0
    use_qk_norm: bool = True
    shared_adaln: bool = False
    condition_type: str = "class"
    num_classes: int = 1000
    text_embed_dim: int | None = None
    text_encoder_config: dict | PreTrainedConfig | None = None
    condition_dropout: float = 0.1
    condition_dropout_in_eval: bool = False
    label_smoothing: float = 0.0
    initializer_range: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.image_tokenizer_config = as_config(self.image_tokenizer_config, MultiScaleVQConfig)
        self.text_encoder_config = as_config(self.text_encoder_config)
        self._complete_from_tokenizer()
        self.patch_nums = normalize_patch_nums(self.patch_nums)
        complete_condition(self)
        sizes = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "num_classes",
        )
        check_positive(self, (*sizes, "vocab_size", "codebook_dim"))
        rates = (
            "hidden_dropout",
            "attention_dropout",
            "drop_path_rate",
            "condition_dropout",
            "label_smoothing",
        )
        check_shares(self, rates)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = self._tensor_parallel_plan()

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How transformers splits the modules of [`VarModel`] over devices; attention is split by heads."""
        plan = {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
        plan |= {
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.mlp.fc1": "colwise",
            "layers.*.mlp.fc2": "rowwise",
            "norm.linear": "colwise_gather_output",
        }
        if self.use_qk_norm:
            plan["layers.*.self_attn.logit_scale"] = "colwise"
        if self.shared_adaln:
            return plan | {"shared_modulation.linear": "colwise_gather_output"}
        return plan | {"layers.*.modulation.linear": "colwise_gather_output"}

    def _complete_from_tokenizer(self) -> None:
        tokenizer = self.image_tokenizer_config
        if tokenizer is not None and not isinstance(tokenizer, MultiScaleVQConfig):
            raise ValueError(
                f"image_tokenizer_config is of type {tokenizer.model_type!r}; VAR takes 'multiscale_vq'."
            )
        names = {"vocab_size": "codebook_size", "codebook_dim": "latent_channels", "patch_nums": "patch_nums"}
        for name, tokenizer_name in names.items():
            if getattr(self, name) is None:
                if tokenizer is None:
                    raise ValueError(f"Without image_tokenizer_config, {name} has to be given.")
                setattr(self, name, getattr(tokenizer, tokenizer_name))

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the token grid of each scale."""
        return grid_sizes(self.patch_nums)

    @property
    def scale_lengths(self) -> list[int]:
        """Tokens of each scale."""
        return [height * width for height, width in self.grid_sizes]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads
