"""What the tokenizers share whose tokens are the cells of one grid over the picture, row by row."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ..layers.codebook import Codebook
from ..loading import StrictPreTrainedModel
from .configuration_grid import GridSize, as_sides
from .pixel_checks import PixelChecks


@dataclass
class GridTokenizerOutput(ModelOutput):
    """
    Output of the training pass of a tokenizer.

    Attributes:
        loss: the sum of the terms below, scalar float32.
        reconstruction: decoded picture (batch, channels, height, width), not clamped; gradients pass straight
            through the quantizer.
        reconstruction_loss: mean squared error of the picture.
        codebook_loss: mean squared distance of the codes to the latents, which stand still, weighted.
        commitment_loss: the same with the codes standing still, weighted.
        quantization_loss: `loss` without the reconstruction's.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    codebook_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    quantization_loss: torch.FloatTensor | None = None


class GridTokenizerModel(PixelChecks, StrictPreTrainedModel):
    """
    Base of tokenizers with `encode_latents` and `decode_latents`, in which each cell of the latent map is one token.

    Attributes:
        quantizer: the codebook.
        output_class: of the training pass.
    """

    output_class: type[GridTokenizerOutput] = GridTokenizerOutput
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    # Not the codebook: FSDP would gather its weights in `forward` only, and it is used by its other methods.
    _no_split_modules = ["ResnetBlock"]

    quantizer: Codebook

    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, channels, H, W) in [-1, 1] to latents (batch, codebook_dim, h, w) before quantization."""
        raise NotImplementedError(f"{type(self).__name__} has to say how pictures become latents.")

    def decode_latents(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (batch, codebook_dim, h, w) to pixels (batch, channels, H, W), not clamped."""
        raise NotImplementedError(f"{type(self).__name__} has to say how codes become pictures.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            bound = 1 / self.config.codebook_size
            init.uniform_(module.weight, -bound, bound)

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
    ) -> GridTokenizerOutput | tuple:
        """
        Training pass: reconstruction through the quantizer with straight-through gradients. Perceptual and adversarial
        terms, as authors' trainers add them, are not among the losses.

        Args:
            pixel_values: (batch, channels, H, W) in [-1, 1].
            return_loss: also compute the losses.
            quantize: `False` decodes the latents themselves, for the first steps of a training; the reconstruction is
                the whole loss then.
        """
        latents = self.encode_latents(pixel_values).permute(0, 2, 3, 1)
        terms = {}
        if quantize:
            codes, codebook_loss, commitment_loss, distances = self.quantizer(latents)
            if return_loss:
                terms = self.weighted_losses(codebook_loss, commitment_loss, distances)
        else:
            codes = self.quantizer.unit(latents.float())
        reconstruction = self.decode_latents(codes.permute(0, 3, 1, 2))
        if return_loss:
            reconstruction_loss = F.mse_loss(reconstruction.float(), pixel_values.float())
            quantization_loss = sum(terms.values(), start=reconstruction_loss.new_zeros(()))
            terms |= {"reconstruction_loss": reconstruction_loss, "quantization_loss": quantization_loss}
            terms["loss"] = reconstruction_loss + quantization_loss
        output = self.output_class(reconstruction=reconstruction, **terms)
        return output if return_dict is not False else output.to_tuple()

    def weighted_losses(
        self, codebook_loss: torch.Tensor, commitment_loss: torch.Tensor, distances: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms of the quantizer with their weights, see [`Codebook`]."""
        raise NotImplementedError(
            f"{type(self).__name__} has to say how it weighs the losses of its codebook."
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
        """The grid of ids (batch, tokens); refuses ids that are none."""
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
