"""Processor of RAR."""

import torch
from PIL import Image

from .processing_llamagen import LlamaGenProcessor


class RarProcessor(LlamaGenProcessor):
    """
    See [`ImageGenerationProcessor`]: class labels or prompts in, PIL images out. Pictures are resized as for LlamaGen, whose
    way the authors' data pipeline shares; drawn ones are cut down to whole brightnesses, not rounded, as they do.
    """

    @staticmethod
    def postprocess(images: torch.Tensor) -> list[Image.Image]:
        pixels = (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pixels]
