"""The shared test bases on the models of this corridor."""

import torch
from transformers import T5Config

from hf_argen import (
    CodeConfig,
    CodeForImageGeneration,
    CollaborativeNextScale,
    KlVaeConfig,
    KlVaeModel,
    LlamaGenConfig,
    LlamaGenForImageGeneration,
    LlamaGenVQConfig,
    LlamaGenVQModel,
    MarConfig,
    MarForImageGeneration,
    MaskGitConfig,
    MaskGitForImageGeneration,
    MaskGitVQConfig,
    MaskGitVQModel,
    MultiScaleVQConfig,
    MultiScaleVQModel,
    RarConfig,
    RarForImageGeneration,
    RelaxedAcceptance,
    TitokConfig,
    TitokModel,
    VarConfig,
    VarForImageGeneration,
)

from ..helpers.tiny import (
    kl_vae_config,
    llamagen_config,
    llamagen_vq_config,
    mar_config,
    maskgit_config,
    maskgit_vq_config,
    rar_config,
    spread,
    text_encoder_config,
    text_var_config,
    titok_config,
    tokenizer_config,
    var_config,
)
from .continuous_base import ContinuousFamilyTests
from .family_base import FamilyTests
from .masked_ids_base import MaskedIdFamilyTests
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


class TestLlamaGenVQ(TokenizerTests):
    model_class = LlamaGenVQModel
    picture = (3, 8, 8)
    num_tokens = 16
    codebook_size = 16
    quantizer = "quantizer"

    def make_config(self, **changes) -> LlamaGenVQConfig:
        return llamagen_vq_config(**{"grid_size": 4, **changes})


class TestLlamaGenVQOfDistances(TestLlamaGenVQ):
    """Codes as they are stored, another decoder than encoder, pictures that are not square."""

    picture = (1, 8, 16)
    num_tokens = 8

    def make_config(self, **changes):
        fields = {
            "normalize_codes": False,
            "in_channels": 1,
            "grid_size": [2, 4],
            "channel_multiplier": [1, 1, 2],
            "decoder_channel_multiplier": [2, 1, 1],
        }
        return llamagen_vq_config(**{**fields, **changes})


class TestLlamaGen(FamilyTests):
    model_class = LlamaGenForImageGeneration
    tolerance_of_traces = 1e-5  # eager code turns by complex numbers, which compilers do not take
    num_tokens = 16
    picture = (3, 8, 8)
    decodings = [
        "grouped_speculative",
        "maximal_coupling_jacobi",
        "next_token",
        "relaxed_acceptance",
        "speculative_decoding",
        "speculative_jacobi",
    ]

    def make_decoding(self, name):
        if name in ("next_token", "speculative_decoding"):
            return name
        if name == "relaxed_acceptance":
            return RelaxedAcceptance(self.make_model(hidden_size=16, num_hidden_layers=1))
        return {"type": name, "window": 3}

    def make_config(self, **changes) -> LlamaGenConfig:
        return llamagen_config(**changes)


class TestLlamaGenOfText(TestLlamaGen):
    """Caption embeddings, given, of unequal length; pictures that are not square."""

    num_tokens = 8
    picture = (3, 4, 8)

    def make_config(self, **changes):
        tokenizer = llamagen_vq_config(grid_size=[2, 4])
        fields = {"condition_type": "text", "text_embed_dim": 12, "max_prompt_tokens": 6}
        return super().make_config(**{"image_tokenizer_config": tokenizer, **fields, **changes})

    def conditions(self, size):
        generator = torch.Generator().manual_seed(1)
        mask = (torch.arange(6)[None] >= torch.arange(size)[:, None] % 4).long()
        return {
            "prompt_embeds": torch.randn(size, 6, 12, generator=generator),
            "prompt_attention_mask": mask,
        }


class TestLlamaGenWithTextEncoder(TestLlamaGen):
    """A T5 encoder inside the model."""

    def make_config(self, **changes):
        encoder = T5Config(
            vocab_size=20, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
        )
        fields = {"condition_type": "text", "text_embed_dim": 12, "max_prompt_tokens": 6}
        return super().make_config(text_encoder_config=encoder, **{**fields, **changes})

    def conditions(self, size):
        ids = torch.arange(size * 5).view(size, 5) % 19 + 1
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        return {"prompt_ids": ids * mask, "prompt_attention_mask": mask}


class TestMaskGitVQ(TokenizerTests):
    model_class = MaskGitVQModel
    picture = (3, 8, 8)
    num_tokens = 16
    codebook_size = 16
    quantizer = "quantizer"

    def make_config(self, **changes) -> MaskGitVQConfig:
        return maskgit_vq_config(**{"grid_size": 4, **changes})


class TestMaskGitVQOfTwoBlocks(TestMaskGitVQ):
    """Two residual blocks a level, grey pictures that are not square."""

    picture = (1, 8, 16)
    num_tokens = 8

    def make_config(self, **changes):
        fields = {"in_channels": 1, "grid_size": [2, 4], "channel_multiplier": [1, 1, 2], "num_res_blocks": 2}
        return maskgit_vq_config(**{**fields, **changes})


class TestRar(TestLlamaGen):
    model_class = RarForImageGeneration

    def make_config(self, **changes) -> RarConfig:
        return rar_config(**changes)


class TestRarOfText(TestRar):
    """A text encoder inside the model; pictures that are not square, on the tokenizer of another family."""

    num_tokens = 8
    picture = (3, 4, 8)

    def make_config(self, **changes):
        encoder = text_encoder_config(12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        fields = {
            "condition_type": "text",
            "text_encoder_config": encoder,
            "image_tokenizer_config": llamagen_vq_config(grid_size=[2, 4]),
        }
        return super().make_config(**{**fields, **changes})

    def conditions(self, size):
        ids = torch.arange(size * 5).view(size, 5) % 11 + 1
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        return {"prompt_ids": ids * mask, "prompt_attention_mask": mask}


class TestKlVae(TokenizerTests):
    model_class = KlVaeModel
    picture = (3, 8, 8)
    num_tokens = 16
    quantizer = "quant_conv"

    def make_config(self, **changes) -> KlVaeConfig:
        return kl_vae_config(**{"grid_size": 4, **changes})


class TestKlVaeWithoutVariance(TestKlVae):
    """Attention elsewhere, means alone, grey pictures that are not square."""

    picture = (1, 8, 16)
    num_tokens = 8

    def make_config(self, **changes):
        fields = {
            "variational": False,
            "in_channels": 1,
            "grid_size": [2, 4],
            "channel_multiplier": [1, 1, 2],
            "encoder_attention_levels": [],
            "decoder_attention_levels": [1, 2],
        }
        return kl_vae_config(**{**fields, **changes})


class TestTitok(TokenizerTests):
    model_class = TitokModel
    picture = (3, 8, 8)
    num_tokens = 5
    codebook_size = 16
    quantizer = "quantizer"

    def make_config(self, **changes) -> TitokConfig:
        return titok_config(**changes)

    def make_model(self, **changes):
        return spread(super().make_model(**changes), std=0.3)


class TestTitokOfPixels(TestTitok):
    """Latents; the decoder, unlike the encoder, predicts grey pixels."""

    picture = (1, 8, 8)
    codebook_size = None
    quantizer = "quant_conv"

    def make_config(self, **changes):
        fields = {
            "quantization": "vae",
            "legacy": False,
            "pixel_decoder_config": None,
            "latent_channels": 16,  # torch draws in sixteens: half batches then get the noise of the whole one
            "in_channels": 1,
            "decoder_patch_size": 4,
            "decoder_hidden_size": 24,
            "decoder_num_attention_heads": 3,
        }
        return super().make_config(**{**fields, **changes})


class TestMaskGit(MaskedIdFamilyTests):
    model_class = MaskGitForImageGeneration
    num_tokens = 5
    num_hidden = 3
    picture = (3, 8, 8)

    def make_config(self, **changes) -> MaskGitConfig:
        return maskgit_config(**changes)


class TestMaskGitOfUvit(TestMaskGit):
    """The other transformer on a grid that is not square, with a text encoder inside the model."""

    test_killed_while_saving = (
        None  # the form of the layers changes nothing in how files are written and read
    )
    test_hostile_folders_are_refused = None
    num_tokens = 8
    num_hidden = 5
    picture = (3, 4, 8)

    def make_config(self, **changes):
        encoder = text_encoder_config(12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        fields = {
            "architecture": "uvit",
            "num_hidden_layers": 2,
            "condition_type": "text",
            "text_encoder_config": encoder,
            "image_tokenizer_config": maskgit_vq_config(grid_size=[2, 4]),
        }
        return super().make_config(**{**fields, **changes})

    def conditions(self, size):
        ids = torch.arange(size * 5).view(size, 5) % 11 + 1
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        return {"prompt_ids": ids * mask, "prompt_attention_mask": mask}


class TestMar(ContinuousFamilyTests):
    model_class = MarForImageGeneration
    num_tokens = 16
    num_hidden = 12
    picture = (3, 8, 8)
    decodings = ["continuous_speculative", "diffusion_step_annealing", "masked"]

    def make_decoding(self, name):
        options = {
            "masked": {},
            "diffusion_step_annealing": {"most_head_steps": 4, "least_head_steps": 2},
            "continuous_speculative": {"draft_length": 1, "max_trials": 2},
        }[name]
        if name == "continuous_speculative":
            options["drafter"] = MarForImageGeneration(self.make_config(num_hidden_layers=1))
        return {"type": name, "num_steps": 3, **options}

    def make_config(self, **changes) -> MarConfig:
        return mar_config(**changes)


class TestFluid(TestMar):
    """
    The tokens of captions through a text encoder and layers of their own, to which every layer attends (arXiv 2410.13863);
    tokens of 2x2 latents, a decoder unlike the encoder, pictures that are not square.
    """

    num_tokens = 32
    num_hidden = 5
    picture = (3, 8, 16)

    def make_config(self, **changes):
        encoder = text_encoder_config(12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        fields = {
            "condition_type": "text",
            "text_encoder_config": encoder,
            "text_conditioning": "cross_attention",
            "num_text_layers": 1,
            "grid_size": [2, 4],
            "patch_size": 2,
            "decoder_hidden_size": 64,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 4,
        }
        return super().make_config(**{**fields, **changes})

    def conditions(self, size):
        ids = torch.arange(size * 5).view(size, 5) % 11 + 1
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        return {"prompt_ids": ids * mask, "prompt_attention_mask": mask}
