"""Processor of LlamaGen."""

from PIL import Image

from .base import ImageGenerationProcessor


class LlamaGenProcessor(ImageGenerationProcessor):
    """
    See [`ImageGenerationProcessor`]: class labels or prompts in, PIL images out. Pictures are resized as in the
    authors' data pipeline: halved by averaging while they are at least twice as large, then bicubic.
    """

    @staticmethod
    def cut(image: Image.Image, height: int, width: int) -> Image.Image:
        while image.width >= 2 * width and image.height >= 2 * height:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(height / image.height, width / image.width)
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        return image.crop((left, top, left + width, top + height))
