"""MaskGIT-VQGAN: convolutional encoder, codebook, convolutional decoder, no attention (arXiv 2202.04200)."""

import torch

from ...layers.codebook import Codebook
from ...layers.convolution import ConvDecoder, ConvEncoder
from ..modeling_grid import GridTokenizerModel
from .configuration_maskgit_vq import MaskGitVQConfig


class MaskGitVQModel(GridTokenizerModel):
    """
    The visual tokenizer of RAR: a picture of h * f by w * f pixels is h * w tokens, row by row.

    >>> tokenizer = hf_argen.convert_original("maskgit_vq", "maskgit-vq-imagenet-256")
    """

    config: MaskGitVQConfig
    config_class = MaskGitVQConfig

    def __init__(self, config: MaskGitVQConfig):
        super().__init__(config)
        shape = {
            "base_channels": config.base_channels,
            "channel_multiplier": config.channel_multiplier,
            "num_res_blocks": config.num_res_blocks,
            "attention_at_lowest": False,
            "norm_num_groups": config.norm_num_groups,
            "norm_eps": config.norm_eps,
            "dropout": config.dropout,
            "maskgit": True,
        }
        self.encoder = ConvEncoder(config.in_channels, config.codebook_dim, **shape)
        self.quantizer = Codebook(config.codebook_size, config.codebook_dim)
        self.decoder = ConvDecoder(config.codebook_dim, config.in_channels, **shape)
        self.post_init()

    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, channels, H, W) in [-1, 1] to latents (batch, codebook_dim, h, w) before quantization."""
        self.check_pixels(pixel_values)
        pixels = pixel_values.add(1).mul(0.5)  # the network was trained on [0, 1]
        return self.encoder(pixels.to(self.encoder.conv_in.weight.dtype))

    def decode_latents(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (batch, codebook_dim, h, w) to pixels (batch, channels, H, W), not clamped."""
        return self.decoder(codes.to(self.decoder.conv_in.weight.dtype)).mul(2).sub(1)

    def weighted_losses(
        self, codebook_loss: torch.Tensor, commitment_loss: torch.Tensor, distances: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return {
            "codebook_loss": self.config.codebook_loss_weight * codebook_loss,
            "commitment_loss": self.config.commitment_loss_weight * commitment_loss,
        }
