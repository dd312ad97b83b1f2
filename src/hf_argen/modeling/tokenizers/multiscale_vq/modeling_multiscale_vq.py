"""Multi-scale residual VQ-VAE: a picture as token grids from coarse to fine (VAR, arXiv 2404.02905, section 3.2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ...layers.convolution import ConvDecoder, ConvEncoder
from ...loading import StrictPreTrainedModel
from ..pixel_checks import PixelChecks
from .configuration_multiscale_vq import MultiScaleVQConfig, grid_sizes
from .quantizer import MultiScaleQuantizer, ResidualConv


@dataclass
class MultiScaleVQOutput(ModelOutput):
    """
    Output of the training pass of [`MultiScaleVQModel`].

    Attributes:
        loss: reconstruction plus quantization loss, scalar float32.
        reconstruction: decoded picture (batch, channels, height, width), not clamped; gradients pass straight
            through the quantizer.
        reconstruction_loss: mean squared error of the picture.
        quantization_loss: mean over the scales of commitment and codebook terms.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    quantization_loss: torch.FloatTensor | None = None


class MultiScaleVQModel(PixelChecks, StrictPreTrainedModel):
    """
    The visual tokenizer of VAR (arXiv 2404.02905).

    The encoder's latent map is explained by a sum of upsampled code maps, one per scale of `config.patch_nums`; the
    ids of all scales, coarse to fine and row by row inside a scale, are the tokens.
    """

    config: MultiScaleVQConfig
    config_class = MultiScaleVQConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    # Not the quantizer: FSDP would gather its weights in `forward` only, and it is used by its other methods.
    _no_split_modules = ["ResnetBlock", "SpatialAttention"]

    def __init__(self, config: MultiScaleVQConfig):
        super().__init__(config)
        shape = {
            "base_channels": config.base_channels,
            "channel_multiplier": config.channel_multiplier,
            "num_res_blocks": config.num_res_blocks,
            "attention_at_lowest": config.attention_at_lowest,
            "norm_num_groups": config.norm_num_groups,
            "norm_eps": config.norm_eps,
            "dropout": config.dropout,
        }
        kernel = config.quant_conv_kernel_size
        latent, channels = config.latent_channels, config.in_channels * config.patch_size**2
        self.encoder = ConvEncoder(channels, latent, **shape)
        self.quant_conv = nn.Conv2d(latent, latent, kernel, padding=kernel // 2)
        self.quantizer = MultiScaleQuantizer(config)
        self.post_quant_conv = nn.Conv2d(latent, latent, kernel, padding=kernel // 2)
        self.decoder = ConvDecoder(latent, channels, **shape)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MultiScaleQuantizer):
            init.zeros_(module.code_usage)
        elif isinstance(module, ResidualConv):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)

    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, channels, H, W) in [-1, 1] to the latent map (batch, latent_channels, h, w) before quantization."""
        self.check_pixels(pixel_values)
        patches = F.pixel_unshuffle(pixel_values, self.config.patch_size)
        return self.quant_conv(self.encoder(patches.to(self.encoder.conv_in.weight.dtype)))

    def decode_latents(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Feature maps (batch, latent_channels, h, w) to pixels (batch, channels, H, W), not clamped."""
        feature_map = feature_map.to(self.post_quant_conv.weight.dtype)
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(feature_map)), self.config.patch_size)

    def encode(self, pixel_values: torch.Tensor, patch_nums: list | None = None) -> torch.LongTensor:
        """
        Tokenizes pictures.

        Args:
            pixel_values: (batch, channels, H, W) in [-1, 1]; H and W are multiples of the downsampling factor and
                the resulting latent map has the size of the last scale.
            patch_nums: scales to use instead of `config.patch_nums`, `n` or `[h, w]` each; lets the tokenizer handle
                pictures of another size or shape.

        Returns:
            ids (batch, tokens) int64, the grids of all scales one after another.

        Raises:
            ValueError: the number of channels or the size of the picture does not fit.
        """
        grids = self._grids(patch_nums)
        self._check_size(pixel_values, grids)
        return self.quantizer.quantize(self.encode_latents(pixel_values), grids)[0]

    def decode(self, codes: torch.Tensor, patch_nums: list | None = None) -> torch.Tensor:
        """
        Ids (batch, tokens), or a summed feature map (batch, latent_channels, h, w), to pixels.

        Returns:
            (batch, channels, H, W) in [-1, 1], in the dtype of the decoder.

        Raises:
            ValueError: ids outside the codebook or of the wrong number.
        """
        if not codes.is_floating_point():
            codes = self.quantizer.feature_maps(codes, self._grids(patch_nums))[-1]
        elif codes.ndim != 4 or codes.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"The feature map has the shape {tuple(codes.shape)}; expected (batch, {self.config.latent_channels}, "
                "height, width). Ids are whole numbers."
            )
        return self.decode_latents(codes).clamp(-1, 1)

    def decode_scales(
        self, ids: torch.Tensor, patch_nums: list | None = None, progressive: bool = False
    ) -> list[torch.Tensor]:
        """
        What the picture looks like after each scale, from ids (batch, tokens).

        Args:
            patch_nums: scales of the ids, as in `encode`.
            progressive: pictures of the scales' own sizes, from a sum that is enlarged from scale to scale, in place
                of pictures of full size. The tokenizer was not trained for it; it gives small previews.

        Returns:
            A picture (batch, channels, H, W) in [-1, 1] per scale.

        Raises:
            ValueError: ids outside the codebook or of the wrong number.
        """
        maps = self.quantizer.feature_maps(ids, self._grids(patch_nums), progressive)
        return [self.decode(feature_map) for feature_map in maps]

    def reconstruct(self, pixel_values: torch.Tensor, patch_nums: list | None = None) -> torch.Tensor:
        """`decode(encode(pixel_values))`: what remains of the picture after tokenization, in [-1, 1]."""
        return self.decode(self.encode(pixel_values, patch_nums), patch_nums)

    def forward(
        self,
        pixel_values: torch.Tensor,
        quantize: bool = True,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> MultiScaleVQOutput | tuple:
        """
        Training pass: reconstruction through the quantizer with straight-through gradients.

        Args:
            pixel_values: (batch, channels, H, W) in [-1, 1].
            quantize: `False` leaves the quantizer out (its loss is 0): the autoencoder alone, to start a training
                with latents that are worth a codebook.
            return_loss: also compute the losses.
        """
        latents = self.encode_latents(pixel_values)
        feature_map, quantization_loss = latents.float(), latents.new_zeros((), dtype=torch.float32)
        if quantize:
            feature_map, quantization_loss = self.quantizer(feature_map)
        reconstruction = self.decode_latents(feature_map)
        loss = reconstruction_loss = None
        if return_loss:
            reconstruction_loss = F.mse_loss(reconstruction.float(), pixel_values.float())
            loss = reconstruction_loss + quantization_loss
        output = MultiScaleVQOutput(loss, reconstruction, reconstruction_loss, quantization_loss)
        return output if return_dict is not False else output.to_tuple()

    def _grids(self, patch_nums: list | None) -> list[tuple[int, int]]:
        return self.config.grid_sizes if patch_nums is None else grid_sizes(patch_nums)

    def _check_size(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> None:
        factor = self.config.downsampling_factor
        expected = (grids[-1][0] * factor, grids[-1][1] * factor)
        if pixel_values.ndim == 4 and tuple(pixel_values.shape[-2:]) != expected:
            raise ValueError(
                f"pixel_values are {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels; the last scale "
                f"{grids[-1]} needs {expected[0]}x{expected[1]}: resize the picture or pass other patch_nums."
            )
