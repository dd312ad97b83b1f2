"""Processor of VAR and of the families built on it."""

from .base import ImageGenerationProcessor


class VarProcessor(ImageGenerationProcessor):
    """See [`ImageGenerationProcessor`]: class labels or prompts in, PIL images out."""
