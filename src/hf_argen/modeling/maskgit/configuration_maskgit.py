"""Configuration of MaskGIT."""

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..config_checks import check_positive, check_shares, complete_condition
from ..layers.sub_config import as_config
from ..tokenizers.configuration_grid import (
    GridTokenizerConfigMixin,
    as_sides,
    check_same_tokens,
    complete_from_tokenizer,
)
from ..tokenizers.titok.configuration_titok import TitokConfig

ARCHITECTURES = {"bert": 1e-12, "uvit": 1e-5}  # and the eps of the layer norms of released checkpoints


class MaskGitConfig(PreTrainedConfig):
    r"""
    Configuration of [`MaskGitForImageGeneration`] (MaskGIT, arXiv 2202.04200). The defaults are the released generator of
    TiTok-L-32 (arXiv 2406.07550).

    Args:
        image_tokenizer_config: configuration of the visual tokenizer, by default that of the released TiTok-L-32; any that
            gives ids, of one row ('titok') or of one grid ('maskgit_vq', 'llamagen_vq'). `None` builds a model without
            tokenizer.
        vocab_size: codes; taken from the tokenizer where not given.
        num_image_tokens: tokens of a picture; taken from the tokenizer or the grid where not given.
        grid_size: of tokens that are cells of a grid, its side, or `[height, width]`; by default the tokenizer's, or else 16.
            `None` with a tokenizer of one row.
        architecture: "bert", a norm behind each part of a layer (ImageBert); "uvit", norms in front, and every layer of the
            second half reads one of the first (U-ViT, arXiv 2209.12152).
        hidden_size, num_attention_heads, intermediate_size, hidden_act: the transformer.
        num_hidden_layers: layers; of "uvit" an even number, half of them on each side of one more in the middle.
        layer_norm_eps: by default 1e-12 for "bert", 1e-5 for "uvit".
        hidden_dropout, attention_dropout: in training.
        label_smoothing, known_token_weight: of the loss; the second weighs tokens that were not hidden, against 1.
        condition_type: "class" or "text".
        num_classes: classes of a class-conditional model; the null class of guidance comes after them.
        text_embed_dim: width of the pooled text embedding of a text-conditional model.
        text_encoder_config: configuration of a text encoder inside the model (any encoder of transformers); `None`
            when embeddings are given as `prompt_embeds`.
        condition_dropout: share of training rows whose condition is replaced by the null condition.
        initializer_range: standard deviation of the weights.
    """

    model_type = "maskgit"
    sub_configs = {"image_tokenizer_config": AutoConfig, "text_encoder_config": AutoConfig}

    image_tokenizer_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    vocab_size: int | None = None
    num_image_tokens: int | None = None
    grid_size: int | list[int] | tuple[int, ...] | None = None
    architecture: str = "bert"
    hidden_size: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float | None = None
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    label_smoothing: float = 0.1
    known_token_weight: float = 0.1
    condition_type: str = "class"
    num_classes: int = 1000
    text_embed_dim: int | None = None
    text_encoder_config: dict | PreTrainedConfig | None = None
    condition_dropout: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.image_tokenizer_config = as_config(self.image_tokenizer_config, TitokConfig)
        self.text_encoder_config = as_config(self.text_encoder_config)
        self._complete_tokens()
        complete_condition(self)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        check_positive(self, (*sizes, "num_image_tokens", "num_classes"))
        shares = ("hidden_dropout", "attention_dropout", "condition_dropout")
        check_shares(self, (*shares, "label_smoothing", "known_token_weight"))
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {self.architecture!r}; known are {', '.join(ARCHITECTURES)}.")
        if self.architecture == "uvit" and self.num_hidden_layers % 2:
            raise ValueError(
                f"num_hidden_layers is {self.num_hidden_layers}; a uvit has as many layers before its middle one as after it, "
                "an even number."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.layer_norm_eps is None:
            self.layer_norm_eps = ARCHITECTURES[self.architecture]
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = self._tensor_parallel_plan()

    def _complete_tokens(self) -> None:
        """Codes and number of tokens from the tokenizer, of one row or of one grid."""
        tokenizer = self.image_tokenizer_config
        if isinstance(tokenizer, GridTokenizerConfigMixin) or (
            tokenizer is None and self.grid_size is not None
        ):
            complete_from_tokenizer(self, codebook_size=1024, grid_size=16)
            height, width = as_sides(self.grid_size)
            if self.num_image_tokens not in (None, height * width):
                raise ValueError(
                    f"num_image_tokens is {self.num_image_tokens}; the grid of {height}x{width} has {height * width}."
                )
            self.num_image_tokens = height * width
            return
        if tokenizer is None:
            self.vocab_size = 4096 if self.vocab_size is None else self.vocab_size
            self.num_image_tokens = 32 if self.num_image_tokens is None else self.num_image_tokens
            return
        check_row_of_ids(tokenizer)
        if self.grid_size is not None:
            raise ValueError(
                f"grid_size is {self.grid_size}; the tokens of a {tokenizer.model_type!r} tokenizer are no grid: leave it out."
            )
        if self.vocab_size is None:
            self.vocab_size = tokenizer.codebook_size
        if self.num_image_tokens is None:
            self.num_image_tokens = tokenizer.num_latent_tokens

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How transformers splits the modules of [`MaskGitModel`] over devices; attention is split by heads."""
        plan: dict[str, str] = {}
        places = (
            ("layers.*",) if self.architecture == "bert" else ("in_layers.*", "mid_layer", "out_layers.*")
        )
        for layer in places:
            plan |= {f"{layer}.self_attn.{name}_proj": "colwise" for name in "qkv"}
            plan |= {f"{layer}.self_attn.o_proj": "rowwise"}
            plan |= {f"{layer}.mlp.fc1": "colwise", f"{layer}.mlp.fc2": "rowwise"}
        return plan

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the token grid, as a list of one; tokens that are no grid are one row."""
        return [(1, self.num_image_tokens or 0) if self.grid_size is None else as_sides(self.grid_size)]

    @property
    def image_size(self) -> list[int]:
        """[height, width] of a picture in pixels; without tokenizer, that of the tokenizers that were released."""
        tokenizer = self.image_tokenizer_config
        if self.grid_size is None:
            return [getattr(tokenizer, "image_size", 256)] * 2
        factor = 16 if tokenizer is None else tokenizer.downsampling_factor
        return [side * factor for side in as_sides(self.grid_size)]

    @property
    def causal(self) -> bool:
        """That tokens see those on both sides; see [`MarConfig`] for models of which some do not."""
        return False

    @property
    def token_size(self) -> int:
        """Numbers of a token: its id."""
        return 1


def check_row_of_ids(tokenizer: PreTrainedConfig) -> None:
    """Refuses the configuration of a tokenizer whose tokens are not one row of ids."""
    if not isinstance(tokenizer, TitokConfig):
        raise ValueError(
            f"image_tokenizer_config is of type {tokenizer.model_type!r}; this model takes tokenizers of one row or one grid of "
            "ids, such as 'titok' or 'maskgit_vq'."
        )
    if tokenizer.quantization != "vq":
        raise ValueError(
            f"The tokenizer has quantization={tokenizer.quantization!r}, latents without codes; this model draws ids: take one "
            "with quantization='vq'."
        )


def check_tokens(config: MaskGitConfig, tokenizer: PreTrainedConfig) -> None:
    """Refuses a tokenizer of other codes or another number of tokens than a transformer's."""
    if config.grid_size is not None:
        check_same_tokens(config, tokenizer)
        return
    check_row_of_ids(tokenizer)
    for name, own, other in (
        ("vocab_size", config.vocab_size, tokenizer.codebook_size),
        ("num_image_tokens", config.num_image_tokens, tokenizer.num_latent_tokens),
    ):
        if own != other:
            raise ValueError(
                f"{name} is {own} in the model and {other} in its image tokenizer; they must agree."
            )
