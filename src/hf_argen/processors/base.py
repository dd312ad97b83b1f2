"""The processor that image families share."""

import os
import re
import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ..storage import check_links, merged_folder
from .class_names import find_class

MAX_PROMPT_CHARACTERS = 2000
SHOWN_CHARACTERS = 40
NUMBER = re.compile(r"-?\d{1,9}")  # an id that was typed


class ImageGenerationProcessor(ProcessorMixin):
    """
    Turns class labels (ids or names), prompts and pictures into tensors, and generated pictures into PIL images.

    Args:
        tokenizer: of the prompts of a text-conditional model; `None` for a class-conditional one.
        class_names: name of each class, in the order of the ids.
        image_size: (height, width) of the pictures.
        max_prompt_tokens: longer prompts are cut, with a warning.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        class_names: Sequence[str] | None = None,
        image_size: Sequence[int] = (256, 256),
        max_prompt_tokens: int = 32,
    ):
        self.chat_template = None
        self.tokenizer = tokenizer
        self.class_names = None if class_names is None else list(class_names)
        self.image_size = tuple(image_size)
        self.max_prompt_tokens = max_prompt_tokens

    @classmethod
    def get_attributes(cls) -> list[str]:
        """No sub-processor that transformers would insist on: the tokenizer is optional."""
        return []

    def to_dict(self) -> dict[str, Any]:
        return {
            "processor_class": type(self).__name__,
            "class_names": self.class_names,
            "image_size": list(self.image_size),
            "max_prompt_tokens": self.max_prompt_tokens,
            "has_tokenizer": self.tokenizer is not None,
        }

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, with the tokenizer; each file whole or not at all."""
        with merged_folder(save_directory) as folder:
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            written = super().save_pretrained(folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).resolve().name), **kwargs)
        return [str(Path(save_directory) / Path(path).name) for path in written or ()]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or a Hub repository."""
        check_links(pretrained_model_name_or_path)
        options, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        options = {key: value for key, value in options.items() if key != "processor_class"}
        tokenizer = None
        if options.pop("has_tokenizer", False):
            kwargs = {key: value for key, value in kwargs.items() if not key.startswith("_")}
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(tokenizer=tokenizer, **options)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | None = None,
        images: Any = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        Args:
            text: one prompt or a list of them.
            class_labels: one class or a list, by id or by name; -1 for none.
            images: a picture or a list of them (PIL), brought to `image_size`.

        Returns:
            `prompt_ids` and `prompt_attention_mask` (batch, tokens) int64; `class_labels` (batch,) int64;
            `pixel_values` (batch, 3, height, width) float32 in [-1, 1]; as far as given.

        Raises:
            ValueError: an empty prompt or list, an over-long prompt, an unknown class.
        """
        data: dict[str, torch.Tensor] = {}
        if text is not None:
            data |= self.encode_prompts([text] if isinstance(text, str) else list(text))
        if class_labels is not None:
            data["class_labels"] = self.encode_labels(class_labels)
        if images is not None:
            data["pixel_values"] = self.preprocess(images)
        return BatchFeature(data, tensor_type=return_tensors)

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Prompts to token ids and their mask."""
        if self.tokenizer is None:
            raise ValueError("This model draws classes, not prompts; give class_labels.")
        if not prompts:
            raise ValueError("The list of prompts is empty; give at least one.")
        for prompt in prompts:
            check_prompt(prompt)
        texts = [prompt.lower().strip() for prompt in prompts]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt", verbose=False)
        counts = encoded["attention_mask"].sum(dim=1).tolist()
        for prompt, count in zip(prompts, counts, strict=True):
            if count == 0:
                raise ValueError(f"The prompt {shortened(prompt)!r} holds nothing that this model reads.")
            if count > self.max_prompt_tokens:
                warnings.warn(
                    f"The prompt {shortened(prompt)!r} has {count} tokens; the model reads the first "
                    f"{self.max_prompt_tokens}.",
                    stacklevel=3,
                )
        if max(counts) > self.max_prompt_tokens:
            encoded = self.tokenizer(
                texts, padding=True, truncation=True, max_length=self.max_prompt_tokens, return_tensors="pt"
            )
        return {"prompt_ids": encoded["input_ids"], "prompt_attention_mask": encoded["attention_mask"]}

    def encode_labels(self, labels: int | str | Sequence[int | str]) -> torch.LongTensor:
        """Class ids or names to ids (batch,) int64."""
        if isinstance(labels, torch.Tensor | np.ndarray):
            labels = labels.tolist()
        labels = [labels] if isinstance(labels, Integral | str) else list(labels)
        if not labels:
            raise ValueError("The list of class labels is empty; give at least one.")
        return torch.tensor([self._class_of(label) for label in labels])

    def _class_of(self, label: Any) -> int:
        is_number = isinstance(label, Integral) or (
            NUMBER.fullmatch(str(label)) and str(label) not in (self.class_names or ())
        )
        if is_number:
            if int(label) < -1:
                raise ValueError(f"The class label {label} is negative; give an id from 0, or -1 for none.")
            return int(label)
        if self.class_names is None:
            raise ValueError(f"This model has no class names; give the id of {label!r}.")
        return find_class(str(label), self.class_names)

    def preprocess(self, images: Any) -> torch.Tensor:
        """Pictures to (batch, 3, height, width) float32 in [-1, 1]: short side resized, centre cut out."""
        images = images if isinstance(images, list | tuple) else [images]
        height, width = self.image_size
        batch = []
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(f"A picture is given as {type(image).__name__}; give PIL images.")
            image = self.cut(flatten(image), height, width)
            batch.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return torch.stack(batch).float() / 127.5 - 1

    def preprocess_masks(self, masks: Any) -> torch.Tensor:
        """Masks (PIL, white where the picture is drawn anew) to (batch, height, width) bool, True there."""
        masks = masks if isinstance(masks, list | tuple) else [masks]
        height, width = self.image_size
        batch = []
        for mask in masks:
            if not isinstance(mask, Image.Image):
                raise ValueError(f"A mask is given as {type(mask).__name__}; give PIL images.")
            mask = _cut(ImageOps.exif_transpose(mask).convert("L"), height, width, Image.Resampling.BOX)
            batch.append(torch.from_numpy(np.array(mask)) >= 128)
        return torch.stack(batch)

    @staticmethod
    def cut(image: Image.Image, height: int, width: int) -> Image.Image:
        """A picture of the model's size: short side resized, centre cut out."""
        return _cut(image, height, width)

    @staticmethod
    def postprocess(images: torch.Tensor) -> list[Image.Image]:
        """Pictures (batch, 3, height, width) in [0, 1] to PIL images."""
        pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(picture) for picture in pixels]


def check_prompt(prompt: Any) -> None:
    """
    Refuses what describes no picture.

    Raises:
        ValueError: no text, nothing to read in it, or too much.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"A prompt is given as {type(prompt).__name__}; give text.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"The prompt {shortened(prompt)!r} is no valid Unicode text; type it anew.")
    if not any(letter.isprintable() and not letter.isspace() for letter in prompt):
        raise ValueError(f"The prompt {shortened(prompt)!r} is empty; describe the picture in a few words.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"The prompt {shortened(prompt)!r} has {len(prompt)} characters; {MAX_PROMPT_CHARACTERS} are the most "
            "that is accepted."
        )


def shortened(text: str) -> str:
    """The beginning of a text, to name it by."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def flatten(image: Image.Image) -> Image.Image:
    """An RGB picture, upright as its EXIF entry says; transparent parts become white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip instead of scaling
        image = Image.fromarray((np.asarray(image, dtype=np.int64) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _cut(
    image: Image.Image, height: int, width: int, filter: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The centre of the picture that has the shape height x width, at that size."""
    return ImageOps.fit(image, (width, height), filter)
