"""Configuration of MAR."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..config_checks import check_positive, check_shares, complete_condition
from ..layers.sub_config import as_config
from ..tokenizers.configuration_grid import as_sides, normalize_grid
from ..tokenizers.kl_vae.configuration_kl_vae import RELEASED_SCALE, KlVaeConfig

TEXT_CONDITIONINGS = ("pooled", "prefix", "cross_attention")


class MarConfig(PreTrainedConfig):
    r"""
    Configuration of [`MarForImageGeneration`] (MAR, arXiv 2406.11838; its text-conditional form Fluid, arXiv 2410.13863).
    The defaults are the released MAR-B.

    Args:
        image_tokenizer_config: configuration of the visual tokenizer, by default that of the released KL-16. `None`
            builds a model without tokenizer.
        grid_size: side of the grid of tokens, or `[height, width]`; by default the tokenizer's, or else 16.
        patch_size: a token is a square of so many latents a side.
        latent_channels: channels of a latent; taken from the tokenizer where not given.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the encoder.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: the
            decoder; by default as the encoder.
        hidden_act, layer_norm_eps: of both.
        hidden_dropout, attention_dropout: in training.
        num_buffer_tokens: positions before the picture that hold the condition; with `text_conditioning="prefix"` the
            most tokens of a prompt.
        causal: every token is predicted from those before it, row by row, as by a language model, and one at a time.
        head_config: the head by its name as `type`, and its options; see `hf_argen.modeling.heads`.
        min_mask_ratio: least share of tokens that training hides; the share is drawn near 1, see `draw_mask_ratio`.
        condition_type: "class" or "text".
        num_classes: classes of a class-conditional model.
        text_conditioning: how a text-conditional model reads captions: "pooled", one vector; "prefix", their tokens
            before the picture; "cross_attention", every layer attends to them, as in Fluid.
        num_text_layers: layers for the tokens of captions alone, which are not pooled; Fluid has 6.
        text_embed_dim: width of the text embeddings of a text-conditional model.
        text_encoder_config: configuration of a text encoder inside the model (any encoder of transformers); `None`
            when embeddings are given as `prompt_embeds`.
        condition_dropout: share of training rows whose condition is replaced by the null condition.
        initializer_range: standard deviation of embeddings and positions.
    """

    model_type = "mar"
    sub_configs = {"image_tokenizer_config": AutoConfig, "text_encoder_config": AutoConfig}

    image_tokenizer_config: dict | PreTrainedConfig | None = field(
        default_factory=lambda: {"latent_scale": RELEASED_SCALE}
    )
    grid_size: int | list[int] | tuple[int, ...] | None = None
    patch_size: int = 1
    latent_channels: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    num_buffer_tokens: int = 64
    causal: bool = False
    head_config: dict[str, Any] = field(default_factory=lambda: {"type": "diffusion"})
    min_mask_ratio: float = 0.7
    condition_type: str = "class"
    num_classes: int = 1000
    text_conditioning: str = "pooled"
    num_text_layers: int = 0
    text_embed_dim: int | None = None
    text_encoder_config: dict | PreTrainedConfig | None = None
    condition_dropout: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.image_tokenizer_config = as_config(self.image_tokenizer_config, KlVaeConfig)
        self.text_encoder_config = as_config(self.text_encoder_config)
        check_positive(self, ("patch_size",))
        self._complete_from_tokenizer()
        complete_condition(self)
        if self.text_conditioning not in TEXT_CONDITIONINGS:
            raise ValueError(
                f"text_conditioning is {self.text_conditioning!r}; known are {', '.join(TEXT_CONDITIONINGS)}."
            )
        if self.num_text_layers and self.conditioning == "vector":
            raise ValueError(
                f"num_text_layers is {self.num_text_layers}; only models that read the tokens of captions have such layers: "
                "set text_conditioning to 'prefix' or 'cross_attention'."
            )
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, f"decoder_{name}") is None:
                setattr(self, f"decoder_{name}", getattr(self, name))
            check_positive(self, (name, f"decoder_{name}"))
        check_positive(self, ("latent_channels", "num_buffer_tokens", "num_classes"))
        check_shares(self, ("hidden_dropout", "attention_dropout", "condition_dropout", "min_mask_ratio"))
        for part in ("", "decoder_"):
            width, heads = getattr(self, f"{part}hidden_size"), getattr(self, f"{part}num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"{part}hidden_size={width} is not a multiple of {part}num_attention_heads={heads}."
                )
        if not isinstance(self.head_config, Mapping) or "type" not in self.head_config:
            raise ValueError(
                f"head_config is {self.head_config!r}; give the head's name as 'type', and its options."
            )
        self.head_config = dict(self.head_config)
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = self._tensor_parallel_plan()

    def _complete_from_tokenizer(self) -> None:
        """Channels and grid from the tokenizer; its grid from ours where it takes pictures of any size."""
        tokenizer = self.image_tokenizer_config
        if tokenizer is not None and not hasattr(tokenizer, "latent_scale"):
            raise ValueError(
                f"image_tokenizer_config is of type {tokenizer.model_type!r}; this model takes tokenizers with a grid of "
                "latents, such as 'kl_vae'."
            )
        if self.latent_channels is None:
            self.latent_channels = 16 if tokenizer is None else tokenizer.latent_channels
        if self.grid_size is None:
            own = [] if tokenizer is None else tokenizer.grid_sizes
            self.grid_size = [side // self.patch_size for side in own[0]] if own else 16
        self.grid_size = normalize_grid(self.grid_size)
        if tokenizer is not None and tokenizer.grid_size is None:
            tokenizer.grid_size = normalize_grid(self.latent_grid)

    @property
    def conditioning(self) -> str:
        """How the condition enters: "vector", "prefix" or "cross_attention"."""
        reads_tokens = self.condition_type == "text" and self.text_conditioning != "pooled"
        return self.text_conditioning if reads_tokens else "vector"

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How transformers splits the modules of [`MarModel`] over devices; attention is split by heads."""
        plan: dict[str, str] = {}
        for layers in ("encoder_layers.*", "decoder_layers.*"):
            for attention in ("self_attn", "cross_attn")[: 1 + (self.conditioning == "cross_attention")]:
                plan |= {f"{layers}.{attention}.{name}_proj": "colwise" for name in "qkv"}
                plan |= {f"{layers}.{attention}.o_proj": "rowwise"}
            plan |= {f"{layers}.mlp.fc1": "colwise", f"{layers}.mlp.fc2": "rowwise"}
        return plan

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the token grid, as a list of one."""
        return [as_sides(self.grid_size)]

    @property
    def latent_grid(self) -> tuple[int, int]:
        """(height, width) of the grid of latents."""
        height, width = as_sides(self.grid_size)
        return height * self.patch_size, width * self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Tokens of a picture."""
        height, width = as_sides(self.grid_size)
        return height * width

    @property
    def token_size(self) -> int:
        """Channels of a token."""
        return self.latent_channels * self.patch_size**2
