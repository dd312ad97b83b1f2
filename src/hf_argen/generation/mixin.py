"""`generate()` of the image families: check the request, build the predictor, run the decoding, pack the output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer
from transformers.utils import ModelOutput

from ..kernels.sample_logits import check_sampled
from . import _compat, sampling
from .decoding.base import Decoding, DecodingResult, Request, resolve
from .devices import warn_of_slow_dtype
from .guidance import Guidance, GuidanceSchedule
from .inputs import check_helpers, check_number_of_generators, expand_conditions, prepare_edit
from .options import prepare_options
from .predictors.base import Predictor
from .sampling import Generators


@dataclass
class ImageGenerationOutput(ModelOutput):
    """
    What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: generated ids (batch, tokens) int64, or latents.
        images: (batch, channels, height, width) float32 in [0, 1]; `None` without image tokenizer.
        steps: decoding steps.
        forward_calls: forward calls of the model, those of a drafter included.
        class_labels: (batch,) the classes that were asked for or drawn; class-conditional models only.
        feature_maps: next-scale models: the feature map (batch, channels, h, w) after each scale.
        logits: with `output_logits`, guided logits (batch, tokens, vocab_size) before any logits processor.
        accept_lengths: draft-and-verify decodings: tokens accepted per call.
        orders: masked models: (batch, tokens), positions in the order in which they became known.
        head_calls: models of continuous tokens: runs of the head's network.
    """

    sequences: torch.Tensor | None = None
    images: torch.FloatTensor | None = None
    steps: int | None = None
    forward_calls: int | None = None
    class_labels: torch.LongTensor | None = None
    feature_maps: tuple[torch.FloatTensor, ...] | None = None
    logits: torch.FloatTensor | None = None
    accept_lengths: torch.Tensor | None = None
    orders: torch.LongTensor | None = None
    head_calls: int | None = None


class ImageGenerationMixin(GenerationMixin):
    """
    Gives an image model `generate()`.

    The model has `predictor_class`, `condition(**inputs)` and `decode_images`, and an `image_tokenizer`.
    """

    predictor_class: type[Predictor]
    default_guidance_schedule: GuidanceSchedule = "constant"
    neutral_guidance_scale: float = 0.0  # see Guidance
    draws_latents: bool = False  # whether tokens are vectors, not ids
    clips_top_k: bool = (
        False  # whether a top_k beyond the vocabulary means all of it, as in the authors' code
    )

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
        latents: torch.Tensor | None = None,
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
            pixel_values, input_ids, latents: a source picture (batch or 1, channels, height, width) in [-1, 1], or its
                tokens, of which `keep_mask` keeps a part: in-painting, out-painting, and editing when the class differs.
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
                `num_return_sequences`, `max_new_tokens`, `return_dict_in_generate`, `output_logits`, `compile_config`
                (steps run as compiled graphs, see docs/kernels.md), ... Those that mean nothing here, such as
                `num_beams`, are refused.

        Returns:
            The generated ids (batch, tokens), or with `return_dict_in_generate=True` an [`ImageGenerationOutput`].
            With `keep_mask`, and in modes that mix codes, the ids alone do not make the picture: take `images`.

        Raises:
            ValueError: a value out of range, an unknown keyword, a decoding that does not fit this model, weights
                that give NaN, logits processors that allow no token.
        """
        config = prepare_options(self, generation_config, kwargs)
        chosen = self._choose_decoding(decoding, config, kwargs)
        check_helpers(generator, logits_processor, stopping_criteria, streamer)
        warn_of_slow_dtype(self.dtype, self.input_device, stacklevel=3)
        if (group := _compat.tensor_parallel_group(self)) is not None:
            sampling.synchronize(generator, self.input_device, group)
        texts = {
            "prompt_embeds": prompt_embeds,
            "prompt_ids": prompt_ids,
            "prompt_attention_mask": prompt_attention_mask,
        }
        inputs, batch_size = expand_conditions(
            self, class_labels, texts, config.num_return_sequences, generator
        )
        check_number_of_generators(generator, batch_size)
        edit = prepare_edit(
            self,
            {"pixel_values": pixel_values, "input_ids": input_ids, "latents": latents},
            keep_mask,
            batch_size,
        )
        if config.do_sample:
            self.draw_ahead(batch_size, generator)
        predictor = self.predictor_class(self, self._guidance(config, guidance_schedule))
        if config.compile_config is not None and not config.disable_compile:
            chosen.compile(predictor, config.compile_config)
        num_steps = None if config.max_new_tokens is None else predictor.steps_for(config.max_new_tokens)
        config.guidance_scale = None  # the predictor guides; transformers' processor would do so once more
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
        del predictor  # its cache is large, and pictures are decoded now
        if streamer is not None:
            streamer.end()
        self._check_finite(result)
        return self._pack(result, inputs, config)

    def draw_ahead(self, batch_size: int, generator: Generators) -> None:
        """Where the authors' sampler draws random numbers before the first token, draws them, to stay in step."""

    def draw_ahead_of_step(self, batch_size: int, passes: int, generator: Generators) -> None:
        """As `draw_ahead`, before the tokens of a step that takes so many passes; masked models of ids."""

    def _guidance(self, config: GenerationConfig, schedule: GuidanceSchedule | None) -> Guidance:
        if schedule is None:
            schedule = getattr(config, "guidance_schedule", None) or self.default_guidance_schedule
        return Guidance(config.guidance_scale or 0.0, schedule, self.neutral_guidance_scale)

    def _choose_decoding(
        self, decoding: Any, config: GenerationConfig, options: Mapping[str, Any] | None = None
    ) -> Decoding:
        """The decoding that is named, else the stored or the plain one, in which the call's own `options` win."""
        from .decoding import available

        if decoding is not None:
            chosen = resolve(decoding)
        else:
            default = getattr(self, "default_decoding", self.predictor_class.default_decoding)
            chosen = Decoding.from_config(config) or available()[default]()
            chosen = chosen.under(options or {})
        chosen.check_fits(self)
        return chosen

    def _check_finite(self, result: DecodingResult) -> None:
        if bool(result.is_finite):
            if result.best is not None:
                check_sampled(result.best)
            return
        overflow = ", or float16 overflows: use dtype=torch.bfloat16" if self.dtype == torch.float16 else ""
        raise ValueError(
            f"{type(self).__name__} produced NaN or infinite logits; its weights are damaged: load the checkpoint "
            f"again{overflow}."
        )

    def _pack(self, result: DecodingResult, inputs: dict[str, Any], config: GenerationConfig) -> Any:
        if not config.return_dict_in_generate:
            return result.sequences
        decodable = result.sequences if result.decodable is None else result.decodable
        has_tokenizer = self.image_tokenizer is not None or self.lent_image_tokenizer
        images = self.decode_partly(decodable) if has_tokenizer else None
        return ImageGenerationOutput(
            sequences=result.sequences,
            images=images,
            steps=result.steps,
            forward_calls=result.forward_calls,
            class_labels=inputs.get("class_labels"),
            **result.details,
        )
