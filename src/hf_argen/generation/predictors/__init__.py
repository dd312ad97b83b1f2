"""Predictors: one guided forward pass of a model with its cache; the seam between models and decodings."""

from .base import Predictor
from .next_scale import NextScalePredictor

__all__ = ["NextScalePredictor", "Predictor"]
