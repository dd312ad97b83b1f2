"""CoDe: a large VAR drafts the coarse scales and a small one refines the fine ones (arXiv 2411.17787)."""

from typing import Any

from ..var.modeling_var import VarForImageGeneration
from .configuration_code import CodeConfig


class CodeForImageGeneration(VarForImageGeneration):
    """
    A VAR, the drafter, that carries a second one, `refiner`; both share the drafter's image tokenizer.

    `forward` is the drafter's, `model.refiner` has its own. `generate` decodes with both
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

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; also lends the image tokenizer to the refiner, whichever of them is set."""
        super().__setattr__(name, value)
        refiner = self._modules.get("refiner") if name in ("refiner", "image_tokenizer") else None
        if refiner is not None:
            refiner.lent_image_tokenizer = () if self.image_tokenizer is None else (self.image_tokenizer,)
