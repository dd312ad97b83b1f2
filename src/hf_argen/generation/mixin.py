"""`generate()` of the image families: check the request, build the predictor, run the decoding, pack the output."""

import difflib
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer
from transformers.utils import ModelOutput

from . import _compat, sampling
from .decoding.base import Decoding, DecodingResult, Edit, Request, resolve
from .guidance import Guidance, GuidanceSchedule
from .predictors.base import Predictor


@dataclass
class ImageGenerationOutput(ModelOutput):
    """
    What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: generated ids (batch, tokens) int64, or latents.
        images: (batch, channels, height, width) float32 in [0, 1].
        steps: decoding steps.
        forward_calls: forward calls of the model, those of a drafter included.
        class_labels: (batch,) the classes that were asked for or drawn; class-conditional models only.
        feature_maps: next-scale models: the feature map (batch, channels, h, w) after each scale.
        logits: with `output_logits`, guided logits (batch, tokens, vocab_size) before any logits processor.
        accept_lengths: draft-and-verify decodings: tokens accepted per call.
    """

    sequences: torch.Tensor | None = None
    images: torch.FloatTensor | None = None
    steps: int | None = None
    forward_calls: int | None = None
    class_labels: torch.LongTensor | None = None
    feature_maps: tuple[torch.FloatTensor, ...] | None = None
    logits: torch.FloatTensor | None = None
    accept_lengths: torch.Tensor | None = None


class ImageGenerationMixin(GenerationMixin):
    """
    Gives an image model `generate()`.

    The model has `predictor_class`, `condition(**inputs)` and `decode_images`, and an `image_tokenizer`.
    """

    predictor_class: type[Predictor]
    default_guidance_schedule: GuidanceSchedule = "constant"

    @property
    def input_device(self) -> torch.device:
        """Where inputs go: the device of the first weight that is not offloaded."""
        devices = (parameter.device for parameter in self.parameters())
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    @torch.no_grad()
    def generate(
        self,
        class_labels: torch.Tensor | Sequence[int] | int | None = None,
        *,
        prompt_embeds: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        decoding: Decoding | dict[str, Any] | str | None = None,
        generation_config: GenerationConfig | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> ImageGenerationOutput | torch.Tensor:
        """
        Generates pictures.

        Args:
            class_labels: class of each picture, -1 for none; `None` draws `num_return_sequences` classes.
            prompt_embeds, prompt_ids, prompt_attention_mask: text, for text-conditional models; with neither,
                `num_return_sequences` pictures are drawn without condition.
            pixel_values, input_ids: a source picture (batch or 1, channels, height, width) in [-1, 1], or its tokens,
                of which `keep_mask` keeps a part: in-painting, out-painting, and editing when the class differs.
            keep_mask: nonzero where the source is kept; (h, w) or (batch, h, w), on the last token grid or in pixels.
            decoding: how to decode, as an instance, a name or a stored dict; default: the one stored in
                `generation_config`, else the family's plain one.
            generation_config: options to start from in place of `self.generation_config`.
            guidance_schedule: "linear", "constant", one factor per step or a function of step and number of steps,
                multiplied with `guidance_scale`; default: the family's.
            generator: one, or one per picture (then a picture does not depend on the batch around it).
            logits_processor, stopping_criteria: as in transformers; each row sees its own sequence.
            streamer: receives, by `put`, the pictures so far (batch, channels, height, width) in [0, 1] after every
                step that changes them, then `end`.
            kwargs: options of [`~transformers.GenerationConfig`]: `do_sample`, `temperature`, `top_k`, `top_p` (0 or
                1 is off), `guidance_scale` (the number of the paper, in its convention; 0 is off),
                `num_return_sequences`, `max_new_tokens`, `return_dict_in_generate`, `output_logits`, ...

        Returns:
            The generated ids (batch, tokens), or with `return_dict_in_generate=True` an [`ImageGenerationOutput`].
            With `keep_mask`, and in modes that mix codes, the ids alone do not make the picture: take `images`.

        Raises:
            ValueError: a value out of range, an unknown keyword, a decoding that does not fit this model, weights
                that give NaN.
        """
        config, schedule = self._generation_options(generation_config, guidance_schedule, kwargs)
        chosen = self._choose_decoding(decoding, config)
        inputs, batch_size = self._expand_inputs(
            class_labels,
            prompt_embeds,
            prompt_ids,
            prompt_attention_mask,
            config.num_return_sequences or 1,
            generator,
        )
        if isinstance(generator, Sequence) and len(generator) != batch_size:
            raise ValueError(
                f"{len(generator)} generators were given for {batch_size} pictures; give one for each."
            )
        edit = self._prepare_edit(pixel_values, input_ids, keep_mask, batch_size)
        predictor = self.predictor_class(self, Guidance(config.guidance_scale or 0.0, schedule))
        num_steps = None if config.max_new_tokens is None else predictor.steps_for(config.max_new_tokens)
        config.guidance_scale = (
            None  # the predictor guides; transformers' processor would do it a second time
        )
        processors, criteria = _compat.prepare_processors(
            self,
            config,
            logits_processor or LogitsProcessorList(),
            stopping_criteria or StoppingCriteriaList(),
        )
        result = chosen.run(
            Request(
                model=self,
                predictor=predictor,
                inputs=inputs,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=criteria,
                generator=generator,
                streamer=streamer,
                edit=edit,
                num_steps=num_steps,
                wants_details=bool(config.return_dict_in_generate),
            )
        )
        if streamer is not None:
            streamer.end()
        if not bool(result.is_finite):
            raise ValueError(
                f"{type(self).__name__} produced NaN or infinite logits: its weights are damaged, or {self.dtype} "
                "overflows; load the checkpoint again, or use dtype=torch.bfloat16 or float32."
            )
        return self._pack(result, inputs, config)

    def _generation_options(
        self,
        generation_config: GenerationConfig | None,
        schedule: GuidanceSchedule | None,
        kwargs: dict[str, Any],
    ) -> tuple[GenerationConfig, GuidanceSchedule]:
        """The options of this call: its own over those of `generation_config` over the model's stored ones."""
        given = generation_config or self.generation_config
        has_top_k = any(
            value is not None for value in (kwargs.get("top_k"), given.top_k, self.generation_config.top_k)
        )
        if kwargs.get("top_p", given.top_p) == 0.0:
            kwargs = {**kwargs, "top_p": 1.0}
        self._check_values(kwargs, given)
        # transformers refuses several sequences without sampling; here the drawn classes differ all the same.
        count = kwargs.pop("num_return_sequences", None)
        config, unknown = _compat.prepare_generation_config(self, generation_config, kwargs)
        config.num_return_sequences = count or config.num_return_sequences
        if unknown:
            name = next(iter(unknown))
            known = [*inspect.signature(self.generate).parameters, *vars(config)]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"generate() of {type(self).__name__} has no keyword {name!r}.{hint}")
        self._refuse(config)
        if not has_top_k:
            config.top_k = 0  # transformers' default of 50 is meant for text
        if schedule is None:
            schedule = getattr(config, "guidance_schedule", None) or self.default_guidance_schedule
        if self.input_device.type == "cpu" and self.dtype == torch.float16:
            warnings.warn(
                "float16 is very slow on most CPUs; load the model with dtype=torch.bfloat16.", stacklevel=3
            )
        return config, schedule

    def _check_values(self, kwargs: dict[str, Any], given: GenerationConfig) -> None:
        """Ranges that transformers clamps silently, or that would only be noticed in the middle of the work."""

        def value(name: str) -> Any:
            for candidate in (kwargs.get(name), getattr(given, name, None)):
                if candidate is not None:
                    return candidate
            return getattr(self.generation_config, name, None)

        temperature, top_k, top_p, count = (
            value(name) for name in ("temperature", "top_k", "top_p", "num_return_sequences")
        )
        if temperature is not None and not temperature > 0:
            raise ValueError(
                f"temperature is {temperature}; it must be above 0 (do_sample=False takes the best token)."
            )
        if top_k is not None and not 0 <= top_k <= self.config.vocab_size:
            raise ValueError(f"top_k is {top_k}; it must lie in [0, {self.config.vocab_size}], 0 is off.")
        if top_p is not None and not 0 <= top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must lie in [0, 1], 0 and 1 are off.")
        if count is not None and count < 1:
            raise ValueError(f"num_return_sequences is {count}; it must be at least 1.")

    def _refuse(self, config: GenerationConfig) -> None:
        """Options of transformers that have no meaning here."""
        refused = {
            "num_beams": (config.num_beams or 1) > 1,
            "use_cache=False": config.use_cache is False,
            "cache_implementation": config.cache_implementation not in (None, "static", "dynamic"),
            "output_scores": bool(config.output_scores),
            "output_attentions": bool(config.output_attentions),
            "output_hidden_states": bool(config.output_hidden_states),
        }
        if asked := [name for name, is_asked in refused.items() if is_asked]:
            raise ValueError(f"generate() of {type(self).__name__} does not support {', '.join(asked)}.")

    def _choose_decoding(self, decoding: Any, config: GenerationConfig) -> Decoding:
        from .decoding import available, compatible_decodings

        if decoding is not None:
            chosen = resolve(decoding)
        else:
            default = getattr(self, "default_decoding", self.predictor_class.default_decoding)
            chosen = Decoding.from_config(config) or available()[default]()
        if not chosen.fits(self):
            fitting = ", ".join(compatible_decodings(self))
            raise ValueError(
                f"{type(self).__name__} cannot be decoded by {chosen.type_name()!r}; it can by {fitting}."
            )
        return chosen

    def _expand_inputs(
        self, class_labels, prompt_embeds, prompt_ids, prompt_attention_mask, num_return_sequences, generator
    ) -> tuple[dict[str, Any], int]:
        """Conditions as tensors on this device, one row per picture, and the number of rows."""
        if self.config.condition_type == "class":
            if any(text is not None for text in (prompt_embeds, prompt_ids)):
                raise ValueError("This model draws from class labels; it cannot read prompts.")
            if class_labels is None:
                class_labels = sampling.uniform(
                    self.config.num_classes, num_return_sequences, generator, self.input_device
                )
                return {"class_labels": class_labels}, num_return_sequences
            if isinstance(class_labels, int):
                class_labels = [class_labels]
            inputs = {"class_labels": torch.as_tensor(class_labels, device=self.input_device)}
            self.check_class_labels(inputs["class_labels"])
        else:
            if class_labels is not None:
                raise ValueError(
                    "This model draws from text; give prompt_ids or prompt_embeds, not class_labels."
                )
            texts = {
                "prompt_embeds": prompt_embeds,
                "prompt_ids": prompt_ids,
                "prompt_attention_mask": prompt_attention_mask,
            }
            inputs = {name: value.to(self.input_device) for name, value in texts.items() if value is not None}
        if not inputs:
            return {"batch_size": num_return_sequences}, num_return_sequences
        expanded = {
            name: value.repeat_interleave(num_return_sequences, dim=0) for name, value in inputs.items()
        }
        batch_size = next(iter(expanded.values())).shape[0]
        if batch_size == 0:
            raise ValueError("The list of conditions is empty; give at least one class label or prompt.")
        return expanded, batch_size

    def _prepare_edit(self, pixel_values, input_ids, keep_mask, batch_size: int) -> Edit | None:
        """The source picture as tokens and the mask on the last token grid; one of each per row."""
        if pixel_values is None and input_ids is None and keep_mask is None:
            return None
        if keep_mask is None or (pixel_values is None) == (input_ids is None):
            raise ValueError(
                "Editing needs keep_mask and the source picture, as pixel_values or as input_ids."
            )
        source = (
            self.encode_images(pixel_values.to(self.input_device))
            if input_ids is None
            else input_ids.to(self.input_device)
        )
        return Edit(
            ids=_one_per_row(source, batch_size, "source picture"),
            keep=_one_per_row(self._mask_on_grid(keep_mask), batch_size, "keep_mask"),
        )

    def _mask_on_grid(self, keep_mask: torch.Tensor) -> torch.Tensor:
        """A mask on the last grid or in pixels to (batch, h, w) float32 on the grid."""
        grid = self.config.grid_sizes[-1]
        factor = self.config.image_tokenizer_config.downsampling_factor
        picture = (grid[0] * factor, grid[1] * factor)
        mask = torch.as_tensor(keep_mask, device=self.input_device)
        size = tuple(mask.shape[-2:])
        if mask.ndim == 4 and mask.shape[1] == 1:
            mask = mask[:, 0]
        if mask.ndim not in (2, 3) or size not in (grid, picture):
            raise ValueError(
                f"keep_mask has the shape {tuple(keep_mask.shape)}; give (height, width) or (batch, height, width) of "
                f"{grid[0]}x{grid[1]} tokens or {picture[0]}x{picture[1]} pixels."
            )
        mask = (mask != 0).float().view(-1, *size)
        return mask if size == grid else F.interpolate(mask[:, None], size=grid, mode="nearest")[:, 0]

    def _pack(self, result: DecodingResult, inputs: dict[str, Any], config: GenerationConfig) -> Any:
        if not config.return_dict_in_generate:
            return result.sequences
        details = dict(result.details)
        if not config.output_logits:
            details.pop("logits", None)
        return ImageGenerationOutput(
            sequences=result.sequences,
            images=self.decode_images(result.sequences if result.decodable is None else result.decodable),
            steps=result.steps,
            forward_calls=result.forward_calls,
            class_labels=inputs.get("class_labels"),
            **details,
        )


def _one_per_row(value: torch.Tensor, batch_size: int, name: str) -> torch.Tensor:
    if value.shape[0] not in (1, batch_size):
        raise ValueError(f"The batch of the {name} is {value.shape[0]}; it must be 1 or {batch_size}.")
    return value.expand(batch_size, *value.shape[1:])
