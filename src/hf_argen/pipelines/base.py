"""What the pipelines of all tasks share."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from PIL import Image
from transformers import Pipeline, ProcessorMixin
from transformers.tokenization_utils_base import BatchEncoding

from ..auto import new_processor
from ..generation.mixin import ImageGenerationMixin
from ..modeling.saving import PUSHING, model_folder, push_with_card
from ..storage import final_name

MAX_BATCH = 16  # inputs that are drawn at once, unless batch_size says otherwise
MAX_IMAGES_PER_PROMPT = 1000

Drawn = dict[str, Image.Image] | list[dict[str, Image.Image]]
"""One picture as `{"image": PIL}`, or with `num_images_per_prompt` above 1 a list of them."""


class ImageGenerationPipeline(Pipeline):
    """
    Base of the pipelines that draw pictures.

    One input gives one result, a list gives a list, a generator or data set an iterator; whole batches are drawn at
    once. Every call takes, and hands to the model:

    - `num_images_per_prompt`: pictures of each input; above 1 a result is a list;
    - `seed`: the i-th picture of every input is drawn with `seed + i`, so that a picture depends neither on the
      inputs around it nor on how many pictures are drawn (but for rounding: batches of other sizes may differ in the
      last digit). Or `generator`: one, or a list with one per picture;
    - `batch_size`: inputs that are drawn at once;
    - everything that the model's `generate` takes: `guidance_scale`, `decoding`, `top_k`, `top_p`, `temperature`,
      `streamer`, ...

    Args:
        model: an image generator of this package.
        processor: default: a new one, where the model needs no tokenizer.
    """

    _load_processor = None
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    condition_type: str | None = None
    other_task = ""

    def __init__(self, model: Any, processor: ProcessorMixin | None = None, **kwargs: Any):
        if not isinstance(model, ImageGenerationMixin):
            raise ValueError(f"{type(model).__name__} is no image generator of hf_argen.")
        found = model.config.condition_type
        if self.condition_type not in (None, found):
            raise ValueError(
                f"This model draws from {'class labels' if found == 'class' else 'prompts'}; "
                f"use pipeline({self.other_task!r})."
            )
        if processor is None:
            if found == "text":
                raise ValueError("A model that draws from text needs its processor; give processor=.")
            processor = new_processor(model.config)
        if found == "class" and processor.class_names is None:  # published models are saved without names
            processor.class_names = new_processor(model.config).class_names
        super().__init__(model, processor=processor, **kwargs)
        if self._batch_size is None:
            self._batch_size = MAX_BATCH

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """
        Writes model, processor and model card to a folder that `pipeline(task, folder)` opens; whole or not at all.

        Args:
            push_to_hub: push the folder too; then also `repo_id` (default: the folder's name), `private`, `token`, ...,
                see [`~hf_argen.hub.push_folder`].
            kwargs: of the model's `save_pretrained`: `max_shard_size`, `variant`, ...
        """
        pushing = {name: kwargs.pop(name) for name in ("repo_id", *PUSHING) if name in kwargs}
        with model_folder(save_directory) as folder:
            self.model.save_pretrained(folder, **kwargs)
            self.processor.save_pretrained(folder)
        if push_to_hub:
            repo_id = pushing.pop("repo_id", final_name(save_directory))
            push_with_card(save_directory, self.model.model_card(repo_id), repo_id, **pushing)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, list | tuple) and not inputs:
            raise ValueError("The list of inputs is empty; give at least one.")
        batch_size = kwargs.get("batch_size")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        return super().__call__(list(inputs) if isinstance(inputs, tuple) else inputs, **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        count = kwargs.get("num_images_per_prompt")
        if count is not None and not 1 <= count <= MAX_IMAGES_PER_PROMPT:
            raise ValueError(
                f"num_images_per_prompt is {count}; it must lie in [1, {MAX_IMAGES_PER_PROMPT}]."
            )
        if "num_return_sequences" in kwargs:
            raise ValueError("A pipeline has no keyword 'num_return_sequences'; use num_images_per_prompt.")
        if kwargs.get("seed") is not None and kwargs.get("generator") is not None:
            raise ValueError("Both seed and generator are given; give one of them.")
        if "return_dict_in_generate" in kwargs:
            raise ValueError("A pipeline returns pictures; call model.generate for its other output.")
        return {}, {name: value for name, value in kwargs.items() if value is not None}, {}

    def run_single(self, inputs: Any, *params: dict[str, Any]) -> Drawn:
        return next(self._draw([[inputs]], *params))

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Drawn]:
        """Results one after another; whole batches are drawn at once. A list is checked before anything is drawn."""
        if isinstance(inputs, Sized):
            count = forward_params.get("num_images_per_prompt", 1) * len(inputs)
            generator = forward_params.get("generator")
            if isinstance(generator, Sequence) and len(generator) != count:
                raise ValueError(
                    f"{len(generator)} generators were given for {count} pictures; give one for each."
                )
        batches: Iterable[list[Any]] = batched(inputs, batch_size)
        if isinstance(inputs, list):
            batches = list(batches)
            for batch in batches:
                self.check(batch)
        return self._draw(batches, preprocess_params, forward_params, postprocess_params)

    def _draw(
        self,
        batches: Iterable[list[Any]],
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Drawn]:
        start = 0
        for batch in batches:
            prepared = self.preprocess(batch, **preprocess_params)
            outputs = self.forward(
                {"inputs": prepared, "start": start, "count": len(batch)}, **forward_params
            )
            start += len(batch)
            yield from self.postprocess(outputs, **postprocess_params)

    def check(self, batch: list[Any]) -> None:
        """Refuses bad inputs; by default by preparing them."""
        self.preprocess(batch)

    @abstractmethod
    def preprocess(self, batch: list[Any]) -> BatchEncoding | dict[str, Any]:
        """A batch of inputs as what `generate` takes, one row per input."""

    def _forward(
        self,
        model_inputs: dict[str, Any],
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        start, count = model_inputs["start"], model_inputs["count"]
        if seed is not None:
            generator = [
                torch.Generator(self.model.input_device).manual_seed(seed + i)
                for _ in range(count)
                for i in range(num_images_per_prompt)
            ]
        elif isinstance(generator, Sequence):
            generator = generator[start * num_images_per_prompt : (start + count) * num_images_per_prompt]
        inputs = dict(model_inputs["inputs"])
        images = self.generate(
            inputs,
            count,
            num_images_per_prompt,
            options if generator is None else {**options, "generator": generator},
        )
        return {"images": images, "per_input": num_images_per_prompt}

    def generate(
        self, inputs: dict[str, Any], count: int, per_input: int, options: dict[str, Any]
    ) -> torch.Tensor:
        """Pictures (count * per_input, 3, height, width) in [0, 1] of `count` inputs."""
        output = self.model.generate(
            **inputs, num_return_sequences=per_input, return_dict_in_generate=True, **options
        )
        return output.images

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Drawn]:
        """Pictures to one result per input."""
        pictures = [{"image": image} for image in self.processor.postprocess(model_outputs["images"])]
        per_input = model_outputs["per_input"]
        if per_input == 1:
            return list(pictures)
        return [pictures[i : i + per_input] for i in range(0, len(pictures), per_input)]


def batched(inputs: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` inputs, read only when they are asked for."""
    iterator = iter(inputs)
    while batch := list(islice(iterator, size)):
        yield batch
