"""KL autoencoder: a picture as a grid of continuous latents (arXiv 2112.10752; KL-16 of MAR, arXiv 2406.11838)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ....generation.sampling import Generators
from ...layers.convolution import ConvDecoder, ConvEncoder
from ...layers.latent_distribution import LatentDistribution
from ...loading import StrictPreTrainedModel
from ..configuration_grid import GridSize, as_sides
from ..pixel_checks import PixelChecks
from .configuration_kl_vae import KlVaeConfig


@dataclass
class KlVaeOutput(ModelOutput):
    """
    Output of the training pass of [`KlVaeModel`].

    Attributes:
        loss: the sum of the terms below, scalar float32.
        reconstruction: decoded picture (batch, channels, height, width), not clamped.
        reconstruction_loss: mean squared error of the picture.
        kl_loss: divergence of the latents' distributions from the standard normal one, mean over latents and batch,
            weighted.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None


class KlVaeModel(PixelChecks, StrictPreTrainedModel):
    """
    A picture of h * f by w * f pixels is h * w latents, row by row.

    >>> tokenizer = hf_argen.convert_original("kl_vae", {"tokenizer": "kl16.ckpt"})
    >>> latents = tokenizer.encode(pixel_values)  # (batch, h * w, 16), of about unit standard deviation
    """

    config: KlVaeConfig
    config_class = KlVaeConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["ResnetBlock", "SpatialAttention"]

    def __init__(self, config: KlVaeConfig):
        super().__init__(config)
        shape = {
            "base_channels": config.base_channels,
            "channel_multiplier": config.channel_multiplier,
            "num_res_blocks": config.num_res_blocks,
            "attention_at_lowest": True,
            "norm_num_groups": config.norm_num_groups,
            "norm_eps": config.norm_eps,
            "dropout": config.dropout,
        }
        latent, channels = config.latent_channels, config.in_channels
        self.encoder = ConvEncoder(
            channels, 2 * latent, attention_levels=config.encoder_attention_levels, **shape
        )
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent if config.variational else latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.decoder = ConvDecoder(
            latent, channels, attention_levels=config.decoder_attention_levels, **shape
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @property
    def latent_scale(self) -> float:
        """See [`KlVaeConfig`]; an error where the configuration has none."""
        if self.config.latent_scale is None:
            raise ValueError(
                "The configuration of this tokenizer has no latent_scale; set it to one over the standard deviation of "
                "its latents (0.2325 for the released KL-16)."
            )
        return self.config.latent_scale

    def encode_latents(self, pixel_values: torch.Tensor) -> LatentDistribution:
        """Pixels (batch, channels, H, W) in [-1, 1] to the distribution of their latents, in float32."""
        self.check_pixels(pixel_values)
        moments = self.quant_conv(self.encoder(pixel_values.to(self.encoder.conv_in.weight.dtype))).float()
        if not self.config.variational:
            return LatentDistribution(moments, torch.ones_like(moments))
        return LatentDistribution.from_moments(moments)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (batch, latent_channels, h, w), not scaled, to pixels (batch, channels, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))

    def encode(
        self,
        pixel_values: torch.Tensor,
        grid_size: GridSize | None = None,
        sample: bool = False,
        generator: Generators = None,
    ) -> torch.Tensor:
        """
        Pictures to scaled latents.

        Args:
            pixel_values: (batch, channels, H, W) in [-1, 1].
            grid_size: the grid of latents of pictures of another size than `config.grid_size`.
            sample: draw the latents, as in the training of generators, in place of their means.
            generator: one, or one per picture.

        Returns:
            (batch, h * w, latent_channels) float32, row by row.

        Raises:
            ValueError: the number of channels or the size of the picture does not fit; no latent scale.
        """
        grid = self.config.grid_size if grid_size is None else grid_size
        factor = self.config.downsampling_factor
        if grid is not None and pixel_values.ndim == 4:
            expected = tuple(side * factor for side in as_sides(grid))
            if tuple(pixel_values.shape[-2:]) != expected:
                raise ValueError(
                    f"pixel_values are {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels; the grid "
                    f"{as_sides(grid)} needs {expected[0]}x{expected[1]}: resize the picture or pass another grid_size."
                )
        scale = self.latent_scale
        found = self.encode_latents(pixel_values)
        latents = found.sample(generator) if sample else found.mean
        return latents.mul(scale).flatten(2).transpose(1, 2)

    def decode(self, latents: torch.Tensor, grid_size: GridSize | None = None) -> torch.Tensor:
        """
        Scaled latents (batch, h * w, latent_channels) to pixels.

        Args:
            grid_size: the grid of latents, if it is not `config.grid_size`; without either a square.

        Returns:
            (batch, channels, H, W) in [-1, 1], in the dtype of the decoder.

        Raises:
            ValueError: latents of another shape or of whole numbers; no latent scale.
        """
        grid = self.config.grid_size if grid_size is None else grid_size
        if grid is None and latents.ndim == 3:
            grid = math.isqrt(latents.shape[1])
        height, width = (0, 0) if grid is None else as_sides(grid)
        channels = self.config.latent_channels
        if latents.ndim != 3 or latents.shape[1:] != (height * width, channels):
            raise ValueError(
                f"The latents have the shape {tuple(latents.shape)}; a grid of {height}x{width} needs (batch, "
                f"{height * width}, {channels}). Give another grid_size for pictures of another shape."
            )
        if not latents.is_floating_point():
            raise ValueError(f"The latents are {latents.dtype}; this tokenizer has no codes to look up.")
        unscaled = latents / self.latent_scale
        return self.decode_latents(unscaled.transpose(1, 2).unflatten(2, (height, width))).clamp(-1, 1)

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What remains of pictures once encoded and decoded, in [-1, 1]; needs no latent scale."""
        return self.decode_latents(self.encode_latents(pixel_values).mean).clamp(-1, 1)

    def forward(
        self, pixel_values: torch.Tensor, return_loss: bool = True, return_dict: bool | None = None
    ) -> KlVaeOutput | tuple:
        """
        Training pass: latents are drawn in training mode, their means taken in evaluation mode. Perceptual and
        adversarial terms, as authors' trainers add them, are not among the losses.

        Args:
            pixel_values: (batch, channels, H, W) in [-1, 1].
            return_loss: also compute the losses.
        """
        found = self.encode_latents(pixel_values)
        reconstruction = self.decode_latents(found.sample() if self.training else found.mean)
        terms = {}
        if return_loss:
            reconstruction_loss = F.mse_loss(reconstruction.float(), pixel_values.float())
            per_latent = found.divergence().mean() / found.mean[0].numel()
            kl_loss = self.config.kl_loss_weight * per_latent
            terms = {
                "loss": reconstruction_loss + kl_loss,
                "reconstruction_loss": reconstruction_loss,
                "kl_loss": kl_loss,
            }
        output = KlVaeOutput(reconstruction=reconstruction, **terms)
        return output if return_dict is not False else output.to_tuple()
