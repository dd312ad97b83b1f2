"""TiTok: transformers between the patches of a picture and a few tokens (arXiv 2406.07550)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from ....generation.sampling import Generators
from ...layers.codebook import Codebook
from ...layers.convolution import ConvDecoder
from ...layers.latent_distribution import LatentDistribution
from ...layers.prenorm import PreNormLayer
from ...loading import StrictPreTrainedModel
from ..pixel_checks import PixelChecks
from .configuration_titok import TitokConfig


@dataclass
class TitokOutput(ModelOutput):
    """
    Output of the training pass of [`TitokModel`].

    Attributes:
        loss: the sum of the terms below, scalar float32.
        reconstruction: decoded picture (batch, channels, height, width), not clamped; gradients pass straight through the
            codebook.
        reconstruction_loss: mean squared error of the picture.
        quantization_loss: of the codebook, weighted; or the divergence from a standard normal distribution, mean over
            latents and batch, weighted.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    quantization_loss: torch.FloatTensor | None = None


class TitokTransformer(nn.Module):
    """
    A class token, patches and latent tokens through one transformer.

    Args:
        config: see [`TitokConfig`].
        part: what the names of its sizes begin with, "" or "decoder_".
        patches: of a picture.
    """

    def __init__(self, config: TitokConfig, part: str, patches: int):
        super().__init__()
        width = getattr(config, f"{part}hidden_size")
        sizes = (
            width,
            getattr(config, f"{part}num_attention_heads"),
            getattr(config, f"{part}intermediate_size"),
        )
        self.patches = patches
        self.class_embedding = nn.Embedding(1, width)
        self.position_embedding = nn.Embedding(1 + patches, width)
        self.latent_position_embedding = nn.Embedding(config.num_latent_tokens, width)
        self.norm_in = nn.LayerNorm(width, config.layer_norm_eps)
        depth = getattr(config, f"{part}num_hidden_layers")
        self.layers = nn.ModuleList(PreNormLayer(config, *sizes) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, patches: torch.Tensor, latents: torch.Tensor, returns_latents: bool) -> torch.Tensor:
        """
        Args:
            patches: (batch, patches, width).
            latents: (batch, num_latent_tokens, width).
            returns_latents: whether the latter are returned, otherwise the former.
        """
        places = torch.arange(1 + self.patches, device=patches.device)
        first = self.class_embedding(places[:1]).expand(len(patches), -1, -1)
        states = torch.cat([first, patches], dim=1) + self.position_embedding(places)
        order = torch.arange(latents.shape[1], device=latents.device)
        states = torch.cat([states, latents + self.latent_position_embedding(order)], dim=1)
        states = self.norm_in(states)
        for layer in self.layers:
            states = layer(states)
        chosen = states[:, 1 + self.patches :] if returns_latents else states[:, 1 : 1 + self.patches]
        return self.norm_out(chosen)


class TitokModel(PixelChecks, StrictPreTrainedModel):
    """
    A picture as `num_latent_tokens` tokens, ids of codes or latents.

    >>> tokenizer = hf_argen.convert_original("titok-l-32")
    """

    config: TitokConfig
    config_class = TitokConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["PreNormLayer", "ResnetBlock"]

    def __init__(self, config: TitokConfig):
        super().__init__(config)
        width, decoder_width = config.hidden_size, config.decoder_hidden_size
        patch, side = config.patch_size, config.image_size // config.patch_size
        self.decoder_side = config.image_size // config.decoder_patch_size
        is_vq = config.quantization == "vq"
        self.latent_embedding = nn.Embedding(config.num_latent_tokens, width)
        self.patch_embedding = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.encoder = TitokTransformer(config, "", side**2)
        self.quant_conv = nn.Conv2d(width, config.latent_channels * (1 if is_vq else 2), 1)
        if is_vq:
            self.quantizer = Codebook(config.codebook_size, config.latent_channels, config.normalize_codes)
        self.post_quant_proj = nn.Linear(config.latent_channels, decoder_width)
        self.mask_embedding = nn.Embedding(1, decoder_width)
        self.decoder = TitokTransformer(config, "decoder_", self.decoder_side**2)
        if config.legacy:
            self._add_pixel_decoder(config)
        else:
            pixels = config.in_channels * config.decoder_patch_size**2
            self.patch_conv = nn.Conv2d(decoder_width, pixels, 1)
            self.pixel_conv = nn.Conv2d(config.in_channels, config.in_channels, 3, padding=1)
        self.post_init()

    def _add_pixel_decoder(self, config: TitokConfig) -> None:
        """What predicts codes of another tokenizer, and its decoder."""
        other, width = config.pixel_decoder_config, config.decoder_hidden_size
        self.code_conv_1 = nn.Conv2d(width, 2 * width, 1)
        self.code_conv_2 = nn.Conv2d(2 * width, other.codebook_size, 1)
        self.pixel_embedding = nn.Linear(other.codebook_size, other.codebook_dim, bias=False)
        self.pixel_decoder = ConvDecoder(
            other.codebook_dim,
            config.in_channels,
            base_channels=other.base_channels,
            channel_multiplier=other.channel_multiplier,
            num_res_blocks=other.num_res_blocks,
            attention_at_lowest=False,
            norm_num_groups=other.norm_num_groups,
            norm_eps=other.norm_eps,
            dropout=other.dropout,
            maskgit=True,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    # Encoding

    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Pixels (batch, channels, height, width) in [-1, 1] to what is quantized, (batch, latent_channels, tokens), or to means
        and log variances, (batch, 2 * latent_channels, tokens).
        """
        self.check_pixels(pixel_values)
        side = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (side, side):
            raise ValueError(
                f"pixel_values are {pixel_values.shape[-2]}x{pixel_values.shape[-1]} pixels; this tokenizer takes "
                f"{side}x{side}: resize the picture."
            )
        pixels = pixel_values.add(1).mul(0.5)  # the network was trained on [0, 1]
        patches = (
            self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        )
        order = torch.arange(self.config.num_latent_tokens, device=pixels.device)
        latents = self.latent_embedding(order).expand(len(pixels), -1, -1)
        encoded = self.encoder(patches, latents, returns_latents=True)
        if self.config.legacy:  # not transposed: so were the released checkpoints trained
            encoded = encoded.reshape(len(encoded), self.config.hidden_size, -1, 1)
        else:
            encoded = encoded.transpose(1, 2).unsqueeze(-1)
        return self.quant_conv(encoded).squeeze(-1)

    def encode(
        self, pixel_values: torch.Tensor, sample: bool = False, generator: Generators = None
    ) -> torch.Tensor:
        """
        Tokenizes pictures.

        Args:
            pixel_values: (batch, channels, image_size, image_size) in [-1, 1].
            sample: with latents, draw them in place of their means.
            generator: one, or one per picture.

        Returns:
            ids (batch, num_latent_tokens) int64; or scaled latents (batch, num_latent_tokens, latent_channels) float32.

        Raises:
            ValueError: the number of channels or the size of the picture does not fit.
        """
        encoded = self.encode_latents(pixel_values)
        if self.config.quantization == "vq":
            return self.quantizer.nearest(encoded.transpose(1, 2))
        found = LatentDistribution.from_moments(encoded)
        latents = found.sample(generator) if sample else found.mean
        return latents.transpose(1, 2) * self.config.latent_scale

    # Decoding

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Codes or unscaled latents (batch, tokens, latent_channels) to pixels, not clamped."""
        states = self.post_quant_proj(latents.to(self.post_quant_proj.weight.dtype))
        place = torch.zeros(len(states), self.decoder_side**2, dtype=torch.long, device=states.device)
        decoded = self.decoder(self.mask_embedding(place), states, returns_latents=False)
        grid = decoded.transpose(1, 2).unflatten(2, (self.decoder_side, self.decoder_side))
        pixels = self._mixed_pixels(grid) if self.config.legacy else self._patch_pixels(grid)
        return pixels.mul(2).sub(1)

    def _mixed_pixels(self, grid: torch.Tensor) -> torch.Tensor:
        """By the other tokenizer, from its codes mixed by how likely they are."""
        logits = self.code_conv_2(torch.tanh(self.code_conv_1(grid)))
        likely = logits.permute(0, 2, 3, 1).softmax(dim=-1, dtype=torch.float32)
        mixed = self.pixel_embedding(likely.to(logits.dtype)).permute(0, 3, 1, 2)
        return self.pixel_decoder(mixed)

    def _patch_pixels(self, grid: torch.Tensor) -> torch.Tensor:
        """From the pixels of each patch, ordered by row, column and channel."""
        side = self.config.decoder_patch_size
        pixels = self.patch_conv(grid).unflatten(1, (side, side, self.config.in_channels))
        pixels = pixels.permute(0, 3, 4, 1, 5, 2)  # (batch, channels, h, row, w, column)
        return self.pixel_conv(pixels.flatten(4, 5).flatten(2, 3))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        Ids (batch, num_latent_tokens), or codes or scaled latents (batch, num_latent_tokens, latent_channels), to pixels.

        Returns:
            (batch, channels, image_size, image_size) in [-1, 1], in the dtype of the decoder.

        Raises:
            ValueError: ids outside the codebook, or tokens of another number or kind.
        """
        count, channels = self.config.num_latent_tokens, self.config.latent_channels
        if not tokens.is_floating_point():
            ids = self._checked(tokens)
            tokens = self.quantizer.embed(ids)
        elif tokens.ndim != 3 or tokens.shape[1:] != (count, channels):
            raise ValueError(
                f"The tokens have the shape {tuple(tokens.shape)}; expected (batch, {count}, {channels}). Ids are whole "
                "numbers."
            )
        elif self.config.quantization == "vae":
            tokens = tokens / self.config.latent_scale
        return self.decode_latents(tokens).clamp(-1, 1)

    def _checked(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids, if there are codes and the ids name some."""
        count = self.config.num_latent_tokens
        if self.config.quantization != "vq":
            raise ValueError(f"The tokens are {ids.dtype}; this tokenizer has no codes to look up.")
        if ids.ndim != 2 or ids.shape[1] != count:
            raise ValueError(f"ids have the shape {tuple(ids.shape)}; {count} tokens need (batch, {count}).")
        low, high = ids.aminmax()
        if int(low) < 0 or int(high) >= self.config.codebook_size:
            raise ValueError(
                f"ids lie between {int(low)} and {int(high)}; the codebook has {self.config.codebook_size} codes."
            )
        return ids

    def reconstruct(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`decode(encode(pixel_values))`: what remains of the picture after tokenization, in [-1, 1]."""
        return self.decode(self.encode(pixel_values))

    def forward(
        self, pixel_values: torch.Tensor, return_loss: bool = True, return_dict: bool | None = None
    ) -> TitokOutput | tuple:
        """
        Training pass. Perceptual and adversarial terms, as the authors' trainer adds them, are not among the losses; nor are
        encoder and codebook frozen, as in their second stage.

        Args:
            pixel_values: (batch, channels, image_size, image_size) in [-1, 1].
            return_loss: also compute the losses.
        """
        encoded = self.encode_latents(pixel_values)
        if self.config.quantization == "vq":
            latents, codebook_loss, commitment_loss, _ = self.quantizer(encoded.transpose(1, 2).unsqueeze(1))
            latents = latents.squeeze(1)
            quantization_loss = codebook_loss + self.config.commitment_loss_weight * commitment_loss
        else:
            found = LatentDistribution.from_moments(encoded)
            latents = (found.sample() if self.training else found.mean).transpose(1, 2)
            per_latent = found.divergence().mean() / found.mean[0].numel()
            quantization_loss = self.config.kl_loss_weight * per_latent
        reconstruction = self.decode_latents(latents)
        loss = reconstruction_loss = None
        if return_loss:
            reconstruction_loss = F.mse_loss(reconstruction.float(), pixel_values.float())
            loss = reconstruction_loss + quantization_loss
        output = TitokOutput(
            loss, reconstruction, reconstruction_loss, quantization_loss if return_loss else None
        )
        return output if return_dict is not False else output.to_tuple()
