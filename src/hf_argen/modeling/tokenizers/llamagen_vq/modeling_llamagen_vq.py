"""LlamaGen's VQ tokenizer: convolutional encoder, codebook of unit vectors, convolutional decoder (arXiv 2406.06525)."""

from dataclasses import dataclass

import torch
from torch import nn

from ...layers.codebook import Codebook
from ...layers.convolution import ConvDecoder, ConvEncoder
from ..modeling_grid import GridTokenizerModel, GridTokenizerOutput
from .configuration_llamagen_vq import LlamaGenVQConfig


@dataclass
class LlamaGenVQOutput(GridTokenizerOutput):
    """
    Output of the training pass of [`LlamaGenVQModel`]; see [`GridTokenizerOutput`].

    Attributes:
        entropy_loss: mean entropy of the assignments minus entropy of the mean assignment, weighted.
    """

    entropy_loss: torch.FloatTensor | None = None


class LlamaGenVQModel(GridTokenizerModel):
    """
    The visual tokenizer of LlamaGen: a picture of h * f by w * f pixels is h * w tokens, row by row.

    >>> tokenizer = hf_argen.convert_original("llamagen-vq-16")
    """

    config: LlamaGenVQConfig
    config_class = LlamaGenVQConfig
    output_class = LlamaGenVQOutput
    _no_split_modules = ["ResnetBlock", "SpatialAttention"]

    ENTROPY_TEMPERATURE = 0.01

    def __init__(self, config: LlamaGenVQConfig):
        super().__init__(config)
        shape = {
            "base_channels": config.base_channels,
            "num_res_blocks": config.num_res_blocks,
            "attention_at_lowest": True,
            "norm_num_groups": config.norm_num_groups,
            "norm_eps": config.norm_eps,
            "dropout": config.dropout,
        }
        latent, channels = config.latent_channels, config.in_channels
        self.encoder = ConvEncoder(channels, latent, channel_multiplier=config.channel_multiplier, **shape)
        self.quant_conv = nn.Conv2d(latent, config.codebook_dim, 1)
        self.quantizer = Codebook(config.codebook_size, config.codebook_dim, config.normalize_codes)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, latent, 1)
        multiplier = config.decoder_channel_multiplier
        self.decoder = ConvDecoder(latent, channels, channel_multiplier=multiplier, **shape)
        self.post_init()

    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, channels, H, W) in [-1, 1] to latents (batch, codebook_dim, h, w) before quantization."""
        self.check_pixels(pixel_values)
        return self.quant_conv(self.encoder(pixel_values.to(self.encoder.conv_in.weight.dtype)))

    def decode_latents(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (batch, codebook_dim, h, w) to pixels (batch, channels, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(codes.to(self.post_quant_conv.weight.dtype)))

    def weighted_losses(
        self, codebook_loss: torch.Tensor, commitment_loss: torch.Tensor, distances: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {
            "codebook_loss": codebook_loss,
            "commitment_loss": self.config.commitment_loss_weight * commitment_loss,
            "entropy_loss": self.config.entropy_loss_weight * self._entropy_loss(-distances),
        }

    def _entropy_loss(self, affinity: torch.Tensor) -> torch.Tensor:
        """Mean entropy of the assignments minus entropy of the mean assignment, of affinities (n, codebook_size)."""
        affinity = affinity / self.ENTROPY_TEMPERATURE
        assignments = affinity.softmax(dim=-1)
        mean = assignments.mean(dim=0)
        of_mean = -(mean * (mean + 1e-5).log()).sum()
        of_each = -(assignments * (affinity + 1e-5).log_softmax(dim=-1)).sum(dim=-1).mean()
        return of_each - of_mean
