"""Configuration of Medusa's heads."""

from typing import Any

from transformers import PreTrainedConfig

from ..config_checks import check_positive


class MedusaHeadsConfig(PreTrainedConfig):
    r"""
    Configuration of [`MedusaHeads`] (arXiv 2401.10774).

    Args:
        hidden_size: of the language model.
        vocab_size: of the language model.
        medusa_num_heads: tokens beyond the next one that are predicted.
        medusa_num_layers: times that the residual block of a head is applied; it is one block, as in the authors' code.
        base_model_name_or_path: the language model that they were trained for.
        initializer_range: of new weights.
    """

    model_type = "medusa_heads"

    hidden_size: int = 4096
    vocab_size: int = 32000
    medusa_num_heads: int = 5
    medusa_num_layers: int = 1
    base_model_name_or_path: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        check_positive(self, ("hidden_size", "vocab_size", "medusa_num_heads"))
        if self.medusa_num_layers < 0:
            raise ValueError(f"medusa_num_layers is {self.medusa_num_layers}; it must be 0 or above.")
        super().__post_init__(**kwargs)
