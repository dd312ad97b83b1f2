"""`pipeline("image-inpainting")`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from .base import ImageGenerationPipeline

FIELDS = ("image", "mask_image", "prompt", "class_labels")


class ImageInpaintingPipeline(ImageGenerationPipeline):
    """
    Draws the white part of a mask anew and leaves the black part as it is; the arguments that all pipelines share are
    in [`ImageGenerationPipeline`].

    >>> import hf_argen
    >>> from transformers import pipeline
    >>> draw = pipeline("image-inpainting")
    >>> draw(image, mask_image, prompt="red apple", seed=0)["image"].save("apple.png")
    """

    def __call__(
        self,
        image: Any,
        mask_image: Image.Image | Sequence[Image.Image] | None = None,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            image: a picture (PIL) or a list of them, brought to the model's size by resizing and cutting out the
                centre; or a dict, or list of dicts, of all these arguments.
            mask_image: white where the picture is drawn anew, of the size of the picture; one for all pictures, or
                one for each. A token is drawn anew when any pixel of it is.
            prompt: what to draw, for text-conditional models; default: nothing in particular.
            class_labels: what to draw, for class-conditional models, by id or by name; default: no class.
            kwargs: see [`ImageGenerationPipeline`]; and `paste` (default True): put the pixels of the source back
                where the mask is black, which otherwise come from the visual tokenizer.

        Returns:
            `{"image": PIL}` at the model's size; a list of them with `num_images_per_prompt` above 1; a list of that
            when any argument is a list.

        Raises:
            ValueError: no mask, a mask of another size, lists of different lengths, whatever `generate` refuses.
        """
        given = dict(zip(FIELDS, (image, mask_image, prompt, class_labels), strict=True))
        if any(isinstance(value, list | tuple) and not value for value in given.values()):
            raise ValueError("A list of inputs is empty; give at least one.")
        first = image[0] if isinstance(image, list | tuple) else image
        if isinstance(first, dict):
            return super().__call__(image, **kwargs)
        lengths = {len(value) for value in given.values() if isinstance(value, list | tuple)}
        if len(lengths) > 1:
            raise ValueError(f"The lists have the lengths {sorted(lengths)}; they must be equal.")
        if not lengths:
            return super().__call__(given, **kwargs)
        count = lengths.pop()
        rows = {
            name: list(value) if isinstance(value, list | tuple) else [value] * count
            for name, value in given.items()
        }
        return super().__call__([{name: rows[name][i] for name in FIELDS} for i in range(count)], **kwargs)

    def preprocess(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        if getattr(self.model.config, "grid_size", self) is None:
            raise ValueError(
                "The tokens of this model are no places of the picture, so that a mask of pixels says nothing; keep tokens by "
                "generate(input_ids=..., keep_mask=...)."
            )
        for row in batch:
            if unknown := set(row) - set(FIELDS):
                raise ValueError(
                    f"An input has the entry {unknown.pop()!r}; it can have {', '.join(FIELDS)}."
                )
            if row.get("image") is None or row.get("mask_image") is None:
                raise ValueError(
                    "In-painting needs image and mask_image, white where the picture is drawn anew."
                )
        images = [row["image"] for row in batch]
        masks = [row["mask_image"] for row in batch]
        pixels = self.processor(images=images)["pixel_values"]
        repaint = self.processor.preprocess_masks(masks)
        for image, mask in zip(images, masks, strict=True):
            sizes = [ImageOps.exif_transpose(one).size for one in (image, mask)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"The mask has the size {sizes[1]} and the picture {sizes[0]}; make them equal."
                )
        inputs = {"pixel_values": pixels, "repaint": repaint}
        return inputs | self._conditions(batch)

    def _conditions(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Prompts or classes; without any, the null condition."""
        labels = [row.get("class_labels") for row in batch]
        prompts = [row.get("prompt") for row in batch]
        if self.model.config.condition_type == "class":
            if any(prompt is not None for prompt in prompts):
                raise ValueError("This model draws classes, not prompts; give class_labels.")
            return dict(self.processor(class_labels=[-1 if label is None else label for label in labels]))
        if any(label is not None for label in labels):
            raise ValueError("This model draws prompts, not classes; give prompt.")
        missing = sum(prompt is None for prompt in prompts)
        if missing == len(prompts):
            return {}
        if missing:
            raise ValueError("Some inputs have a prompt and others have none; give all or none.")
        return dict(self.processor(text=prompts))

    def generate(
        self, inputs: dict[str, Any], count: int, per_input: int, options: dict[str, Any]
    ) -> torch.Tensor:
        options = dict(options)
        paste = options.pop("paste", True)
        source = inputs.pop("pixel_values").repeat_interleave(per_input, dim=0)
        repaint = inputs.pop("repaint").repeat_interleave(per_input, dim=0).unsqueeze(1).float()
        grid = self.model.config.grid_sizes[-1]
        keep = 1 - F.adaptive_max_pool2d(repaint, grid)[:, 0]
        rows = per_input if inputs else count * per_input
        images = super().generate({**inputs, "pixel_values": source, "keep_mask": keep}, count, rows, options)
        if not paste:
            return images
        repaint = repaint.to(images.device)
        return images * repaint + (source.to(images.device) + 1) / 2 * (1 - repaint)
