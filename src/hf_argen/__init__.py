"""Autoregressive generation in the Hugging Face ecosystem: published checkpoints, any decoding that fits."""

import importlib
from typing import TYPE_CHECKING, Any

from .auto import register_with_transformers

if TYPE_CHECKING:
    from .auto import AutoModelForImageGeneration
    from .convert import convert_original
    from .generation import Decoding, compatible_decodings, generate
    from .generation.decoding.collaborative_next_scale import CollaborativeNextScale
    from .generation.decoding.continuous_speculative import ContinuousSpeculative
    from .generation.decoding.diffusion_step_annealing import DiffusionStepAnnealing
    from .generation.decoding.grouped_speculative import GroupedSpeculative
    from .generation.decoding.masked import Masked
    from .generation.decoding.maximal_coupling_jacobi import MaximalCouplingJacobi
    from .generation.decoding.next_scale import NextScale
    from .generation.decoding.next_token import NextToken
    from .generation.decoding.relaxed_acceptance import RelaxedAcceptance
    from .generation.decoding.speculative.acceptance import ExactMatch, RejectionSampling, TypicalAcceptance
    from .generation.decoding.speculative.adaptive_ngram import AdaptiveNGram, SearchTree
    from .generation.decoding.speculative.drafters import DraftModel
    from .generation.decoding.speculative.dynamic_tree import DynamicTree
    from .generation.decoding.speculative.ngram import NGram
    from .generation.decoding.speculative.opt_tree import OptTree
    from .generation.decoding.speculative.spectr import SpecTr
    from .generation.decoding.speculative.trees import Chain, IndependentSequences, StaticTree
    from .generation.decoding.speculative_decoding import SpeculativeDecoding
    from .generation.decoding.speculative_jacobi import SpeculativeJacobi
    from .modeling.code.configuration_code import CodeConfig
    from .modeling.code.modeling_code import CodeForImageGeneration
    from .modeling.drafters.configuration_eagle import EagleConfig
    from .modeling.drafters.configuration_medusa import MedusaHeadsConfig
    from .modeling.drafters.drafting import EagleDrafter, MedusaDrafter
    from .modeling.drafters.modeling_eagle import Eagle
    from .modeling.drafters.modeling_medusa import MedusaHeads
    from .modeling.llamagen.configuration_llamagen import LlamaGenConfig
    from .modeling.llamagen.modeling_llamagen import LlamaGenForImageGeneration, LlamaGenModel
    from .modeling.mar.configuration_mar import MarConfig
    from .modeling.mar.modeling_mar import MarForImageGeneration, MarModel
    from .modeling.maskgit.configuration_maskgit import MaskGitConfig
    from .modeling.maskgit.modeling_maskgit import MaskGitForImageGeneration, MaskGitModel
    from .modeling.rar.configuration_rar import RarConfig
    from .modeling.rar.modeling_rar import RarForImageGeneration, RarModel
    from .modeling.tokenizers.kl_vae.configuration_kl_vae import KlVaeConfig
    from .modeling.tokenizers.kl_vae.modeling_kl_vae import KlVaeModel
    from .modeling.tokenizers.llamagen_vq.configuration_llamagen_vq import LlamaGenVQConfig
    from .modeling.tokenizers.llamagen_vq.modeling_llamagen_vq import LlamaGenVQModel
    from .modeling.tokenizers.maskgit_vq.configuration_maskgit_vq import MaskGitVQConfig
    from .modeling.tokenizers.maskgit_vq.modeling_maskgit_vq import MaskGitVQModel
    from .modeling.tokenizers.multiscale_vq.configuration_multiscale_vq import MultiScaleVQConfig
    from .modeling.tokenizers.multiscale_vq.modeling_multiscale_vq import MultiScaleVQModel
    from .modeling.tokenizers.titok.configuration_titok import TitokConfig
    from .modeling.tokenizers.titok.modeling_titok import TitokModel
    from .modeling.var.configuration_var import VarConfig
    from .modeling.var.modeling_var import VarForImageGeneration, VarModel
    from .processors.processing_llamagen import LlamaGenProcessor
    from .processors.processing_rar import RarProcessor
    from .processors.processing_var import VarProcessor

__version__ = "0.1.0"

_SOURCES = {
    "AutoModelForImageGeneration": "auto",
    "CodeConfig": "modeling.code.configuration_code",
    "CodeForImageGeneration": "modeling.code.modeling_code",
    "CollaborativeNextScale": "generation.decoding.collaborative_next_scale",
    "ContinuousSpeculative": "generation.decoding.continuous_speculative",
    "Decoding": "generation",
    "Eagle": "modeling.drafters.modeling_eagle",
    "EagleConfig": "modeling.drafters.configuration_eagle",
    "EagleDrafter": "modeling.drafters.drafting",
    "MedusaDrafter": "modeling.drafters.drafting",
    "MedusaHeads": "modeling.drafters.modeling_medusa",
    "MedusaHeadsConfig": "modeling.drafters.configuration_medusa",
    "LlamaGenConfig": "modeling.llamagen.configuration_llamagen",
    "LlamaGenForImageGeneration": "modeling.llamagen.modeling_llamagen",
    "LlamaGenModel": "modeling.llamagen.modeling_llamagen",
    "LlamaGenProcessor": "processors.processing_llamagen",
    "LlamaGenVQConfig": "modeling.tokenizers.llamagen_vq.configuration_llamagen_vq",
    "LlamaGenVQModel": "modeling.tokenizers.llamagen_vq.modeling_llamagen_vq",
    "MaskGitConfig": "modeling.maskgit.configuration_maskgit",
    "MaskGitForImageGeneration": "modeling.maskgit.modeling_maskgit",
    "MaskGitModel": "modeling.maskgit.modeling_maskgit",
    "MaskGitVQConfig": "modeling.tokenizers.maskgit_vq.configuration_maskgit_vq",
    "MaskGitVQModel": "modeling.tokenizers.maskgit_vq.modeling_maskgit_vq",
    "MultiScaleVQConfig": "modeling.tokenizers.multiscale_vq.configuration_multiscale_vq",
    "MultiScaleVQModel": "modeling.tokenizers.multiscale_vq.modeling_multiscale_vq",
    "DiffusionStepAnnealing": "generation.decoding.diffusion_step_annealing",
    "GroupedSpeculative": "generation.decoding.grouped_speculative",
    "MaximalCouplingJacobi": "generation.decoding.maximal_coupling_jacobi",
    "RelaxedAcceptance": "generation.decoding.relaxed_acceptance",
    "AdaptiveNGram": "generation.decoding.speculative.adaptive_ngram",
    "SearchTree": "generation.decoding.speculative.adaptive_ngram",
    "SpeculativeDecoding": "generation.decoding.speculative_decoding",
    "DraftModel": "generation.decoding.speculative.drafters",
    "NGram": "generation.decoding.speculative.ngram",
    "Chain": "generation.decoding.speculative.trees",
    "IndependentSequences": "generation.decoding.speculative.trees",
    "StaticTree": "generation.decoding.speculative.trees",
    "DynamicTree": "generation.decoding.speculative.dynamic_tree",
    "OptTree": "generation.decoding.speculative.opt_tree",
    "ExactMatch": "generation.decoding.speculative.acceptance",
    "RejectionSampling": "generation.decoding.speculative.acceptance",
    "TypicalAcceptance": "generation.decoding.speculative.acceptance",
    "SpecTr": "generation.decoding.speculative.spectr",
    "SpeculativeJacobi": "generation.decoding.speculative_jacobi",
    "KlVaeConfig": "modeling.tokenizers.kl_vae.configuration_kl_vae",
    "KlVaeModel": "modeling.tokenizers.kl_vae.modeling_kl_vae",
    "MarConfig": "modeling.mar.configuration_mar",
    "MarForImageGeneration": "modeling.mar.modeling_mar",
    "MarModel": "modeling.mar.modeling_mar",
    "Masked": "generation.decoding.masked",
    "NextScale": "generation.decoding.next_scale",
    "NextToken": "generation.decoding.next_token",
    "RarConfig": "modeling.rar.configuration_rar",
    "RarForImageGeneration": "modeling.rar.modeling_rar",
    "RarModel": "modeling.rar.modeling_rar",
    "RarProcessor": "processors.processing_rar",
    "TitokConfig": "modeling.tokenizers.titok.configuration_titok",
    "TitokModel": "modeling.tokenizers.titok.modeling_titok",
    "VarConfig": "modeling.var.configuration_var",
    "VarForImageGeneration": "modeling.var.modeling_var",
    "VarModel": "modeling.var.modeling_var",
    "VarProcessor": "processors.processing_var",
    "compatible_decodings": "generation",
    "convert_original": "convert",
    "generate": "generation",
}

# Written out for type checkers; a test keeps it equal to the table above.
__all__ = [
    "AutoModelForImageGeneration",
    "CodeConfig",
    "CodeForImageGeneration",
    "CollaborativeNextScale",
    "ContinuousSpeculative",
    "Decoding",
    "Eagle",
    "EagleConfig",
    "EagleDrafter",
    "MedusaDrafter",
    "MedusaHeads",
    "MedusaHeadsConfig",
    "LlamaGenConfig",
    "LlamaGenForImageGeneration",
    "LlamaGenModel",
    "LlamaGenProcessor",
    "LlamaGenVQConfig",
    "LlamaGenVQModel",
    "MaskGitConfig",
    "MaskGitForImageGeneration",
    "MaskGitModel",
    "MaskGitVQConfig",
    "MaskGitVQModel",
    "MultiScaleVQConfig",
    "MultiScaleVQModel",
    "DiffusionStepAnnealing",
    "GroupedSpeculative",
    "MaximalCouplingJacobi",
    "RelaxedAcceptance",
    "AdaptiveNGram",
    "SearchTree",
    "SpeculativeDecoding",
    "DraftModel",
    "NGram",
    "Chain",
    "IndependentSequences",
    "StaticTree",
    "DynamicTree",
    "OptTree",
    "ExactMatch",
    "RejectionSampling",
    "TypicalAcceptance",
    "SpecTr",
    "SpeculativeJacobi",
    "KlVaeConfig",
    "KlVaeModel",
    "MarConfig",
    "MarForImageGeneration",
    "MarModel",
    "Masked",
    "NextScale",
    "NextToken",
    "RarConfig",
    "RarForImageGeneration",
    "RarModel",
    "RarProcessor",
    "TitokConfig",
    "TitokModel",
    "VarConfig",
    "VarForImageGeneration",
    "VarModel",
    "VarProcessor",
    "__version__",
    "compatible_decodings",
    "convert_original",
    "generate",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_SOURCES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
