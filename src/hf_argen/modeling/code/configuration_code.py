"""Configuration of CoDe."""

from dataclasses import field

from transformers import AutoConfig, PreTrainedConfig

from ..layers.sub_config import as_config
from ..tokenizers.multiscale_vq.configuration_multiscale_vq import MultiScaleVQConfig
from ..var.configuration_var import VarConfig


class CodeConfig(VarConfig):
    r"""
    Configuration of [`CodeForImageGeneration`] (CoDe, arXiv 2411.17787): that of the drafter, which is a VAR with
    image tokenizer, and of its refiner.

    Args:
        refiner_config: configuration of the small VAR that draws the fine scales; it has no image tokenizer of its own.
    """

    model_type = "code"
    sub_configs = {
        "image_tokenizer_config": MultiScaleVQConfig,
        "text_encoder_config": AutoConfig,
        "refiner_config": VarConfig,
    }

    refiner_config: dict | PreTrainedConfig | None = field(default_factory=dict)

    def _complete_from_tokenizer(self) -> None:
        super()._complete_from_tokenizer()
        if isinstance(self.refiner_config, dict):
            shared = ("vocab_size", "codebook_dim", "patch_nums", "condition_type", "num_classes")
            fields = {name: getattr(self, name) for name in shared} | self.refiner_config
            self.refiner_config = as_config(fields | {"image_tokenizer_config": None}, VarConfig)
