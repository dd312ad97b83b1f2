"""Base classes of all families."""

import os
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ..generation import _compat
from ..generation.decoding import Decoding
from . import conversion
from .loading import StrictPreTrainedModel


class ArgenPreTrainedModel(StrictPreTrainedModel):
    """
    A family's `PreTrainedModel`: strict loading and conversion of the authors' checkpoints.

    The folder of a family holds `convert_<family>.py` and `presets.json` beside the modeling file; that is where
    `from_original` looks.
    """

    # The training loss is a mean over tokens, so gradient accumulation has to divide by the number of steps.
    accepts_loss_kwargs = False

    @classmethod
    def from_original(cls, source: str, variant: str | None = None, **kwargs: Any) -> Self:
        """
        Fetches a checkpoint that the authors published and converts it.

        Args:
            source: the authors' Hub repository, for example `"FoundationVision/var"`, or the name of a preset.
            variant: which of the repository's checkpoints, for example `"d16"`.
            kwargs: `cache_dir`, `token`, `revision`, `local_files_only` and so on for the download.

        Raises:
            ValueError: no preset of this family has that source and variant (the message lists them), or a file does
                not fit.
        """
        package = cls.__module__.rsplit(".", 1)[0]
        model = conversion.convert_from_hub(package, source, variant, **kwargs)
        if not isinstance(model, cls):
            raise ValueError(
                f"{source!r} ({variant}) converts to {type(model).__name__}, not to {cls.__name__}."
            )
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a decoding set as an object in `generation_config` is stored in its plain form."""
        config = getattr(self, "generation_config", None)
        if config is not None:
            if isinstance(decoding := getattr(config, "decoding", None), Decoding):
                decoding.store(config)
            _compat.keep_own_entries(config)
        return super().save_pretrained(save_directory, *args, **kwargs)


class ImageModelMixin:
    """
    What the image families share: a frozen visual tokenizer and the way from tokens to pictures.

    The tokenizer may be replaced, `model.image_tokenizer = another`, where its tokens are the same; the configuration
    follows.

    Attributes:
        lent_image_tokenizer: in a part of a larger model, the tokenizer of the whole, as a tuple of one or none, so
            that it does not become a submodule of the part, to be saved and counted twice.
    """

    lent_image_tokenizer: tuple[nn.Module, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "image_tokenizer" and isinstance(value, PreTrainedModel):
            self.check_tokenizer_fits(value.config)
            self.config.image_tokenizer_config = value.config
            value.eval().requires_grad_(False)
        super().__setattr__(name, value)

    def check_tokenizer_fits(self, config: PreTrainedConfig) -> None:
        """Refuses an image tokenizer with this configuration whose tokens are not those of the model."""
        raise NotImplementedError(f"{type(self).__name__} has to say which image tokenizers fit it.")

    def build_image_tokenizer(self, config: PreTrainedConfig | None) -> nn.Module | None:
        """The tokenizer that a sub-configuration describes."""
        return None if config is None else AutoModel.from_config(config)

    def train(self, mode: bool = True) -> Self:
        """As in torch; the image tokenizer has a training of its own and stays frozen, in evaluation mode."""
        super().train(mode)
        if self.image_tokenizer is not None:
            self.image_tokenizer.eval().requires_grad_(False)
        return self

    def check_image_tokenizer(self) -> nn.Module:
        """The visual tokenizer, its own or that of the model it is part of, or an error that says how to get one."""
        if self.image_tokenizer is None:
            for tokenizer in self.lent_image_tokenizer:
                return tokenizer
            raise ValueError(
                f"This {type(self).__name__} was built without image tokenizer; give its configuration an "
                "image_tokenizer_config."
            )
        return self.image_tokenizer

    @torch.no_grad()
    def decode_images(self, sequences: torch.Tensor) -> torch.Tensor:
        """
        Generated tokens to pictures.

        Args:
            sequences: ids (batch, tokens), or latents in the form that the tokenizer decodes.

        Returns:
            (batch, channels, height, width) float32 in [0, 1].

        Raises:
            ValueError: the tokenizer's weights give NaN.
        """
        pixels = self.check_image_tokenizer().decode(sequences).float()
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError(
                f"The image tokenizer of {type(self).__name__} produced NaN: its weights or its input are damaged; "
                "load the checkpoint again."
            )
        return pixels.add(1).mul(0.5)

    @torch.no_grad()
    def decode_partly(self, sequences: torch.Tensor) -> torch.Tensor:
        """As `decode_images`, of pictures whose last rows of tokens may be missing; grey stands in their place."""
        height, width = self.config.grid_sizes[-1]
        if sequences.is_floating_point() or sequences.shape[1] >= height * width:
            return self.decode_images(sequences)
        tokenizer = self.check_image_tokenizer()
        factor, rows = tokenizer.config.downsampling_factor, sequences.shape[1] // width
        size = (len(sequences), tokenizer.config.in_channels, height * factor, width * factor)
        pictures = torch.full(size, 0.5, device=sequences.device)
        if rows:
            pixels = tokenizer.decode(sequences[:, : rows * width], grid_size=(rows, width))
            pictures[:, :, : rows * factor] = pixels.float().add(1).mul(0.5)
        return pictures

    def ids_and_labels(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        labels: torch.Tensor | None,
        return_loss: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The ids of the teacher-forced pass and its labels, from ids or from pictures, whose tokens are their own labels.

        Raises:
            ValueError: neither or both are given.
        """
        if (input_ids is None) == (pixel_values is None):
            raise ValueError("Give either input_ids or pixel_values.")
        if pixel_values is not None:
            input_ids = self.encode_images(pixel_values)
            labels = input_ids if labels is None and return_loss else labels
        return input_ids, labels

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures (batch, channels, height, width) in [-1, 1] to tokens."""
        return self.check_image_tokenizer().encode(pixel_values)
