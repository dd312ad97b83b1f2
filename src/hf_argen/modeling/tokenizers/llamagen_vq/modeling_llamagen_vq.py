"""LlamaGen's VQ tokenizer: convolutional encoder, codebook of unit vectors, convolutional decoder (arXiv 2406.06525)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ...layers.convolution import ConvDecoder, ConvEncoder
from ...loading import StrictPreTrainedModel
from .configuration_llamagen_vq import LlamaGenVQConfig, as_sides

GridSize = int | list[int] | tuple[int, ...]


@dataclass
class LlamaGenVQOutput(ModelOutput):
    """
    Output of the training pass of [`LlamaGenVQModel`].

    Attributes:
        loss: the sum of the terms below, scalar float32.
        reconstruction: decoded picture (batch, channels, height, width), not clamped; gradients pass straight
            through the quantizer.
        reconstruction_loss: mean squared error of the picture.
        codebook_loss: mean squared distance of the codes to the latents, which stand still.
        commitment_loss: the same with the codes standing still, weighted.
        entropy_loss: mean entropy of the assignments minus entropy of the mean assignment, weighted.
        quantization_loss: the sum of the three last.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    entropy_loss: torch.FloatTensor | None = None
    quantization_loss: torch.FloatTensor | None = None


class Codebook(nn.Module):
    """The codes; maps latents (batch, h, w, channels) to ids and back, in float32."""

    ENTROPY_TEMPERATURE = 0.01

    def __init__(self, config: LlamaGenVQConfig):
        super().__init__()
        self.normalize = config.normalize_codes
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

    def codes(self, device: torch.device | None = None) -> torch.Tensor:
        """All codes as they are used, (codebook_size, codebook_dim) float32."""
        return self.embed(torch.arange(self.embedding.num_embeddings, device=device))

    def unit(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors of unit length, where codes are normalised."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (...) to codes (..., codebook_dim) float32, on the device of the ids wherever the weights are."""
        return self.unit(self.embedding(ids).float().to(ids.device))

    def distances(self, latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Squared distances of latents (n, channels) to all codes, (n, codebook_size)."""
        squares = latents.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
        return squares - 2 * latents @ codes.t()

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """Ids (...) of the codes that are nearest to the latents (..., channels)."""
        latents = self.unit(latents.float())
        return (
            self.distances(latents.flatten(0, -2), self.codes(latents.device))
            .argmin(dim=1)
            .view(latents.shape[:-1])
        )

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes in place of latents with straight-through gradients; codebook, commitment and entropy terms."""
        latents, codes = self.unit(latents.float()), self.codes(latents.device)
        distances = self.distances(latents.flatten(0, -2), codes)
        nearest = codes[distances.argmin(dim=1)].view(latents.shape)
        codebook_loss = F.mse_loss(nearest, latents.detach())
        commitment_loss = F.mse_loss(latents, nearest.detach())
        return (
            latents + (nearest - latents).detach(),
            codebook_loss,
            commitment_loss,
            self._entropy_loss(-distances),
        )

    @torch.no_grad()
    def revive_codes(self, latents: torch.Tensor, min_share: float = 0.1) -> torch.LongTensor:
        """
        Replaces codes that are hardly drawn by latents of the batch (random restarts, arXiv 2005.00341).

        Args:
            latents: (batch, channels, h, w) of training pictures, enough of them that a code in use is drawn often.
            min_share: a code is dead if it is drawn less than this share of what equal use of all codes would give.

        Returns:
            Indices (n,) of the replaced codes; the optimizer's moments for these rows of `embedding` are stale.
        """
        vectors = self.unit(latents.float().permute(0, 2, 3, 1).flatten(0, 2))
        size = self.embedding.num_embeddings
        drawn = torch.bincount(self.nearest(vectors), minlength=size)
        dead = (drawn <= min_share * len(vectors) / size).nonzero().flatten()[: len(vectors)]
        chosen = vectors[torch.randperm(len(vectors))[: len(dead)].to(vectors.device)]
        self.embedding.weight[dead] = chosen.to(self.embedding.weight.dtype)
        return dead

    def _entropy_loss(self, affinity: torch.Tensor) -> torch.Tensor:
        affinity = affinity / self.ENTROPY_TEMPERATURE
        assignments = affinity.softmax(dim=-1)
        mean = assignments.mean(dim=0)
        of_mean = -(mean * (mean + 1e-5).log()).sum()
        of_each = -(assignments * (affinity + 1e-5).log_softmax(dim=-1)).sum(dim=-1).mean()
        return of_each - of_mean


class LlamaGenVQModel(StrictPreTrainedModel):
    """
    The visual tokenizer of LlamaGen: a picture of h * f by w * f pixels is h * w tokens, row by row.

    >>> tokenizer = hf_argen.convert_original("llamagen-vq-16")
    """

    config: LlamaGenVQConfig
    config_class = LlamaGenVQConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    # Not the codebook: FSDP would gather its weights in `forward` only, and it is used by its other methods.
    _no_split_modules = ["ResnetBlock", "SpatialAttention"]

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
        self.quantizer = Codebook(config)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, latent, 1)
        multiplier = config.decoder_channel_multiplier
        self.decoder = ConvDecoder(latent, channels, channel_multiplier=multiplier, **shape)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            bound = 1 / self.config.codebook_size
            init.uniform_(module.weight, -bound, bound)

    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, channels, H, W) in [-1, 1] to latents (batch, codebook_dim, h, w) before quantization."""
        self._check_pixels(pixel_values)
        return self.quant_conv(self.encoder(pixel_values.to(self.encoder.conv_in.weight.dtype)))

    def decode_latents(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (batch, codebook_dim, h, w) to pixels (batch, channels, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(codes.to(self.post_quant_conv.weight.dtype)))

    def encode(self, pixel_values: torch.Tensor, grid_size: GridSize | None = None) -> torch.LongTensor:
        """
        Tokenizes pictures.

        Args:
            pixel_values: (batch, channels, H, W) in [-1, 1].
            grid_size: the token grid of pictures of another size than `config.grid_size`.

        Returns:
            ids (batch, tokens) int64, row by row.

        Raises:
            ValueError: the number of channels or the size of the picture does not fit.
        """
        self._check_size(pixel_values, grid_size)
        latents = self.encode_latents(pixel_values)
        return self.quantizer.nearest(latents.permute(0, 2, 3, 1)).flatten(1)

    def decode(self, codes: torch.Tensor, grid_size: GridSize | None = None) -> torch.Tensor:
        """
        Ids (batch, tokens), or codes (batch, codebook_dim, h, w), to pixels.

        Args:
            grid_size: the token grid, if it is not `config.grid_size`; without either a square.

        Returns:
            (batch, channels, H, W) in [-1, 1], in the dtype of the decoder.

        Raises:
            ValueError: ids outside the codebook or of the wrong number.
        """
        if not codes.is_floating_point():
            height, width = self._grid(codes, grid_size)
            codes = self.quantizer.embed(codes).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        elif codes.ndim != 4 or codes.shape[1] != self.config.codebook_dim:
            raise ValueError(
                f"The codes have the shape {tuple(codes.shape)}; expected (batch, {self.config.codebook_dim}, height, "
                "width). Ids are whole numbers."
            )
        return self.decode_latents(codes).clamp(-1, 1)

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`decode(encode(pixel_values))`: what remains of the picture after tokenization, in [-1, 1]."""
        factor = self.config.downsampling_factor
        grid = [side // factor for side in pixel_values.shape[-2:]]
        return self.decode(self.encode(pixel_values), grid)

    def forward(
        self,
        pixel_values: torch.Tensor,
        return_loss: bool = True,
        quantize: bool = True,
        return_dict: bool | None = None,
    ) -> LlamaGenVQOutput | tuple:
        """
        Training pass: reconstruction through the quantizer with straight-through gradients. The authors' trainer adds
        perceptual and adversarial terms of its own to these losses.

        Args:
            pixel_values: (batch, channels, H, W) in [-1, 1].
            return_loss: also compute the losses.
            quantize: `False` decodes the latents themselves, for the first steps of a training; the losses of the
                codebook do not count then.
        """
        latents = self.encode_latents(pixel_values).permute(0, 2, 3, 1)
        if quantize:
            codes, codebook_loss, commitment_loss, entropy_loss = self.quantizer(latents)
        else:
            codes = self.quantizer.unit(latents.float())
            codebook_loss = commitment_loss = entropy_loss = codes.new_zeros(())
        reconstruction = self.decode_latents(codes.permute(0, 3, 1, 2))
        if not return_loss:
            output = LlamaGenVQOutput(reconstruction=reconstruction)
            return output if return_dict is not False else output.to_tuple()
        reconstruction_loss = F.mse_loss(reconstruction.float(), pixel_values.float())
        commitment_loss = self.config.commitment_loss_weight * commitment_loss
        entropy_loss = self.config.entropy_loss_weight * entropy_loss
        quantization_loss = codebook_loss + commitment_loss + entropy_loss
        output = LlamaGenVQOutput(
            loss=reconstruction_loss + quantization_loss,
            reconstruction=reconstruction,
            reconstruction_loss=reconstruction_loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            entropy_loss=entropy_loss,
            quantization_loss=quantization_loss,
        )
        return output if return_dict is not False else output.to_tuple()

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.in_channels:
            raise ValueError(
                f"pixel_values have the shape {tuple(pixel_values.shape)}; expected (batch, "
                f"{self.config.in_channels}, height, width)."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values are {pixel_values.dtype}; give floating point numbers in [-1, 1]."
            )
        factor = self.config.downsampling_factor
        if any(side == 0 or side % factor for side in pixel_values.shape[-2:]):
            raise ValueError(
                f"pixel_values are {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels; both sides must be "
                f"multiples of {factor}."
            )

    def _check_size(self, pixel_values: torch.Tensor, grid_size: GridSize | None) -> None:
        grid = self.config.grid_size if grid_size is None else grid_size
        if grid is None or pixel_values.ndim != 4:
            return
        factor = self.config.downsampling_factor
        expected = tuple(side * factor for side in as_sides(grid))
        if tuple(pixel_values.shape[-2:]) != expected:
            raise ValueError(
                f"pixel_values are {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels; the grid {as_sides(grid)} "
                f"needs {expected[0]}x{expected[1]}: resize the picture or pass another grid_size."
            )

    def _grid(self, ids: torch.Tensor, grid_size: GridSize | None) -> tuple[int, int]:
        grid = self.config.grid_size if grid_size is None else grid_size
        if grid is None:
            side = math.isqrt(ids.shape[-1])
            grid = side
            if side * side != ids.shape[-1]:
                raise ValueError(f"{ids.shape[-1]} ids make no square; pass their grid as grid_size.")
        height, width = as_sides(grid)
        if ids.ndim != 2 or ids.shape[1] != height * width:
            raise ValueError(
                f"ids have the shape {tuple(ids.shape)}; {height}x{width} tokens need (batch, {height * width})."
            )
        low, high = ids.aminmax()
        if int(low) < 0 or int(high) >= self.config.codebook_size:
            raise ValueError(
                f"ids lie between {int(low)} and {int(high)}; the codebook has {self.config.codebook_size} codes."
            )
        return height, width
