"""CoDe: a large VAR drafts the coarse scales and a small one refines the fine ones (arXiv 2411.17787)."""

from ..var.modeling_var import VarForImageGeneration
from .configuration_code import CodeConfig


class CodeForImageGeneration(VarForImageGeneration):
    """
    A VAR, the drafter, that carries a second one, `refiner`; both share the drafter's image tokenizer.

    `forward` is the drafter's. `generate` decodes with both
    ([`~hf_argen.generation.decoding.collaborative_next_scale.CollaborativeNextScale`]); `decoding="next_scale"` uses
    the drafter alone.
    """

    config: CodeConfig
    config_class = CodeConfig
    default_decoding = "collaborative_next_scale"

    def __init__(self, config: CodeConfig):
        super().__init__(config)
        self.refiner = VarForImageGeneration(config.refiner_config)
        self.post_init()
