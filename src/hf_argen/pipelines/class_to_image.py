"""`pipeline("class-to-image")`."""

from collections.abc import Sequence
from typing import Any

from .base import ImageGenerationPipeline


class ClassToImagePipeline(ImageGenerationPipeline):
    """
    Pictures of classes; the arguments that all pipelines share are in [`ImageGenerationPipeline`].

    >>> import hf_argen
    >>> from transformers import pipeline
    >>> draw = pipeline("class-to-image", "folder-of-a-converted-model")
    >>> draw(["red fox", 980], seed=0, num_images_per_prompt=4)
    """

    condition_type = "class"
    other_task = "text-to-image"

    def __call__(self, class_labels: int | str | Sequence[int | str], **kwargs: Any) -> Any:
        """
        Args:
            class_labels: a class or a list of them, by id or by name; -1 for none.
            kwargs: see [`ImageGenerationPipeline`].

        Returns:
            `{"image": PIL}`; a list of them with `num_images_per_prompt` above 1; a list of that for a list.

        Raises:
            ValueError: an empty list, an unknown class, whatever `generate` refuses.
        """
        if hasattr(class_labels, "tolist"):  # an array or tensor
            class_labels = class_labels.tolist()
        return super().__call__(class_labels, **kwargs)

    def preprocess(self, batch: list[int | str]) -> Any:
        return self.processor(class_labels=batch)

    def check(self, batch: list[int | str]) -> None:
        self.model.check_class_labels(self.preprocess(batch)["class_labels"])
