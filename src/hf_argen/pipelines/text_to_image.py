"""`pipeline("text-to-image")`."""

from collections.abc import Sequence
from typing import Any

from .base import ImageGenerationPipeline


class TextToImagePipeline(ImageGenerationPipeline):
    """
    Pictures of prompts; the arguments that all pipelines share are in [`ImageGenerationPipeline`].

    >>> import hf_argen
    >>> from transformers import pipeline
    >>> pipeline("text-to-image")("red apple", seed=0)["image"].save("apple.png")
    """

    condition_type = "text"
    other_task = "class-to-image"

    def __call__(self, prompt: str | Sequence[str], **kwargs: Any) -> Any:
        """
        Args:
            prompt: one prompt or a list of them.
            kwargs: see [`ImageGenerationPipeline`].

        Returns:
            `{"image": PIL}`; a list of them with `num_images_per_prompt` above 1; a list of that for a list.

        Raises:
            ValueError: an empty prompt or list, an over-long prompt, whatever `generate` refuses.
        """
        return super().__call__(prompt, **kwargs)

    def preprocess(self, batch: list[str]) -> Any:
        return self.processor(text=batch)
