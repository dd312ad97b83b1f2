"""Configuration of the KL autoencoder."""

import math
from numbers import Real
from typing import Any

from transformers import PreTrainedConfig

from ...config_checks import check_norm_groups, check_positive, check_shares
from ..configuration_grid import GridConfigMixin, normalize_grid

RELEASED_SCALE = 0.2325  # of KL-16, as MAR, FAR and xAR use it


class KlVaeConfig(GridConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`KlVaeModel`] (arXiv 2112.10752, as in MAR, arXiv 2406.11838). The defaults are those of the
    released KL-16, but for `latent_scale`, which belongs to the weights.

    Args:
        latent_channels: channels of a latent.
        latent_scale: factor that brings latents to unit standard deviation, 0.2325 for KL-16; `encode` multiplies by
            it and `decode` divides. Without it the model trains, but neither encodes nor decodes.
        variational: whether the encoder gives a variance, too; otherwise its logarithm is 1.
        base_channels: width of the first level of encoder and decoder.
        channel_multiplier: width of each level in units of `base_channels`, from the highest resolution down; its
            length fixes the downsampling factor 2 ** (levels - 1).
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
        encoder_attention_levels, decoder_attention_levels: levels with attention after every residual block, counted
            from the highest resolution; the middle always has it.
        norm_num_groups, norm_eps: of every group norm.
        dropout: inside the residual blocks, in training.
        in_channels: channels of the picture.
        grid_size: side of the grid of latents, or `[height, width]`; `None` takes pictures of any size.
        kl_loss_weight: of the divergence from a standard normal distribution in the training loss.
    """

    model_type = "kl_vae"

    latent_channels: int = 16
    latent_scale: float | None = None
    variational: bool = True
    base_channels: int = 128
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    encoder_attention_levels: list[int] | tuple[int, ...] = (4,)
    decoder_attention_levels: list[int] | tuple[int, ...] = ()
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    in_channels: int = 3
    grid_size: int | list[int] | tuple[int, ...] | None = None
    kl_loss_weight: float = 1e-6

    def __post_init__(self, **kwargs: Any) -> None:
        self.channel_multiplier = list(self.channel_multiplier)
        self.encoder_attention_levels = list(self.encoder_attention_levels)
        self.decoder_attention_levels = list(self.decoder_attention_levels)
        self.grid_size = normalize_grid(self.grid_size)
        sizes = ("latent_channels", "base_channels", "num_res_blocks", "in_channels", "norm_num_groups")
        check_positive(self, sizes)
        check_shares(self, ("dropout",))
        check_norm_groups(self, self.channel_multiplier)
        levels = len(self.channel_multiplier)
        for name in ("encoder_attention_levels", "decoder_attention_levels"):
            for level in getattr(self, name):
                if not 0 <= level < levels:
                    raise ValueError(f"{name} names level {level}; there are the levels 0 to {levels - 1}.")
        scale = self.latent_scale
        if scale is not None and not (isinstance(scale, Real) and 0 < scale < math.inf):
            raise ValueError(f"latent_scale is {scale!r}; it must be a number above 0.")
        super().__post_init__(**kwargs)
