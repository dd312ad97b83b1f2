"""Configuration of EAGLE."""

from typing import Any

from transformers import PreTrainedConfig

from ..config_checks import check_positive


class EagleConfig(PreTrainedConfig):
    r"""
    Configuration of [`Eagle`] (arXiv 2401.15077, 2406.16858, 2503.01840).

    Args:
        version: 1, whose weights EAGLE-2 uses too, or 3.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
            hidden_act, rms_norm_eps, max_position_embeddings, attention_bias: of the drafter's layers, as in Llama;
            `attention_bias` adds biases to queries, keys and values.
        vocab_size: of the language model.
        draft_vocab_size: tokens that version 3 drafts; `None` for all.
        target_hidden_size: of the language model.
        feature_layers: which three of the language model's hidden states version 3 reads, as transformers counts them (0
            goes into the first layer, -1 comes out of the last norm); `None` for the authors' choice, 2, half of the
            layers and all but 3.
        base_model_name_or_path: the language model that it was trained for.
        qk_norm: whether queries and keys are normed head by head, as in Qwen3.
        norm_before_residual: whether the residual of version 3 are the features after their norm.
        norm_before_fc: whether version 3 norms the three features side by side before it projects them.
        fc_norm: whether it norms each of them.
        norm_output: whether what version 3 reads of itself is normed (EAGLE-3.1).
        rope_theta: base of the rotary frequencies.
        rope_factor: by how much positions are shrunk.
        fc_bias: whether the projection of version 1 has a bias.
        has_embedding: whether it has input embeddings of its own; otherwise the language model's serve.
        initializer_range: of new weights.
    """

    model_type = "eagle"

    version: int = 1
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    attention_dropout: float = 0.0
    vocab_size: int = 32000
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    feature_layers: list[int] | None = None
    base_model_name_or_path: str | None = None
    qk_norm: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    fc_bias: bool = True
    has_embedding: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.version not in (1, 3):
            raise ValueError(f"version is {self.version}; it must be 1 (EAGLE and EAGLE-2) or 3.")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        check_positive(self, (*sizes, "num_key_value_heads", "head_dim", "draft_vocab_size"))
        if self.version == 1 and self.target_hidden_size != self.hidden_size:
            raise ValueError(
                f"target_hidden_size is {self.target_hidden_size} and hidden_size {self.hidden_size}; in version 1, which "
                "shares the language model's head, they must agree."
            )
        if self.feature_layers is not None and (self.version == 1 or len(self.feature_layers) != 3):
            raise ValueError(
                f"feature_layers is {self.feature_layers} in version {self.version}; version 3 reads three layers, "
                "version 1 the last one alone."
            )
        if self.norm_before_fc and self.fc_norm:
            raise ValueError(
                "norm_before_fc and fc_norm are both true; the features are normed together or each."
            )
        super().__post_init__(**kwargs)

    @property
    def num_features(self) -> int:
        """Layers of the language model whose hidden states are read."""
        return 1 if self.version == 1 else 3

    def read_layers(self, num_hidden_layers: int) -> tuple[int, ...]:
        """
        Which hidden states are read of a language model of so many layers.

        Raises:
            ValueError: it has too few.
        """
        if self.version == 1:
            return (-1,)
        if self.feature_layers is None:
            if num_hidden_layers < 7:
                raise ValueError(
                    f"EAGLE-3 reads three layers of a model, which needs at least 7; this one has {num_hidden_layers}. "
                    "Name others in feature_layers."
                )
            return (2, num_hidden_layers // 2, num_hidden_layers - 3)
        if not all(-1 <= layer <= num_hidden_layers for layer in self.feature_layers):
            raise ValueError(
                f"The Eagle reads the hidden states {self.feature_layers}, but the language model has {num_hidden_layers} "
                "layers: it belongs to another base model."
            )
        return tuple(self.feature_layers)
