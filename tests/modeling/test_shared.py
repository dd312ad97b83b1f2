"""The shared test bases on the models of this corridor."""

import torch

from hf_argen import (
    CodeConfig,
    CodeForImageGeneration,
    CollaborativeNextScale,
    MultiScaleVQConfig,
    MultiScaleVQModel,
    VarConfig,
    VarForImageGeneration,
)

from ..helpers.tiny import text_var_config, tokenizer_config, var_config
from .family_base import FamilyTests
from .tokenizer_base import TokenizerTests


class TestMultiScaleVQ(TokenizerTests):
    model_class = MultiScaleVQModel
    picture = (3, 16, 16)
    num_tokens = 21
    codebook_size = 16
    quantizer = "quantizer"

    def make_config(self, **changes) -> MultiScaleVQConfig:
        return tokenizer_config(**{"num_residual_convs": 3, **changes})


class TestMultiScaleVQOfCosines(TestMultiScaleVQ):
    """Normalised codes, one shared convolution, a first grid larger than 1x1, pictures that are not square."""

    picture = (1, 8, 16)
    num_tokens = 11

    def make_config(self, **changes):
        fields = {
            "normalize_codes": True,
            "num_residual_convs": 1,
            "in_channels": 1,
            "patch_nums": [[1, 3], [2, 4]],
            "quant_conv_kernel_size": 1,
            "attention_at_lowest": False,
        }
        return tokenizer_config(**{**fields, **changes})


class TestVar(FamilyTests):
    model_class = VarForImageGeneration
    num_tokens = 21
    picture = (3, 16, 16)
    decodings = ["collaborative_next_scale", "next_scale"]

    def make_config(self, **changes) -> VarConfig:
        return var_config(**{"condition_dropout": 0.0, **changes})

    def make_decoding(self, name):
        if name != "collaborative_next_scale":
            return name
        return CollaborativeNextScale(refiner=self.make_model(hidden_size=16, num_hidden_layers=1))


class TestVarSharedModulation(TestVar):
    """One modulation for all layers, plain attention, a first grid of several tokens, no square pictures."""

    num_tokens = 14
    picture = (3, 8, 16)

    def make_config(self, **changes):
        tokenizer = tokenizer_config(patch_nums=[[1, 2], 2, [2, 4]], num_residual_convs=0)
        fields = {"shared_adaln": True, "use_qk_norm": False, "image_tokenizer_config": tokenizer}
        return super().make_config(**{**fields, **changes})


class TestVarOfText(TestVar):
    """A text encoder inside the model."""

    def make_config(self, **changes):
        config = text_var_config(vocab_size=12)
        config.condition_dropout = 0.0
        encoder = config.text_encoder_config
        encoder.hidden_dropout_prob = encoder.attention_probs_dropout_prob = 0.0
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    def conditions(self, size):
        ids = torch.arange(size * 5).view(size, 5) % 11 + 1
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        return {"prompt_ids": ids * mask, "prompt_attention_mask": mask}


class TestCode(TestVar):
    """The drafter is trained as a VAR; the refiner is trained apart and joined."""

    model_class = CodeForImageGeneration
    without_gradient = ("refiner.",)

    def make_config(self, **changes) -> CodeConfig:
        drafter = super().make_config(**changes).to_dict()
        del drafter["model_type"]
        refiner = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
        return CodeConfig(**{**drafter, "refiner_config": refiner})

    def make_decoding(self, name):
        return name
