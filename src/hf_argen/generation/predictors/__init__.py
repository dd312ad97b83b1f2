"""Predictors: one guided forward pass of a model with its cache; the seam between models and decodings."""

from .base import Predictor

__all__ = ["Predictor"]
