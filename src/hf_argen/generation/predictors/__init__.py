"""Predictors: one guided forward pass of a model with its cache; the seam between models and decodings."""

from .base import Predictor
from .language_model import LanguageModelPredictor
from .next_scale import NextScalePredictor
from .next_token import NextTokenPredictor, Prompt

__all__ = ["LanguageModelPredictor", "NextScalePredictor", "NextTokenPredictor", "Predictor", "Prompt"]
