"""Configuration of CoDe."""

from dataclasses import field

from transformers import AutoConfig, PreTrainedConfig

from ..tokenizers.multiscale_vq.configuration_multiscale_vq import MultiScaleVQConfig
from ..var.configuration_var import VarConfig, as_config


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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.refiner_config, dict):
            from_drafter = {
                name: getattr(self, name)
                for name in ("vocab_size", "codebook_dim", "patch_nums", "condition_type", "num_classes")
            }
            own = {**from_drafter, **self.refiner_config, "image_tokenizer_config": None}
            self.refiner_config = as_config(own, VarConfig)
