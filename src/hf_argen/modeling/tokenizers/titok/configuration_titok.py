"""Configuration of TiTok's tokenizers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ...config_checks import check_positive, check_shares
from ...layers.sub_config import as_config
from ..maskgit_vq.configuration_maskgit_vq import MaskGitVQConfig

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


class TitokConfig(PreTrainedConfig):
    r"""
    Configuration of [`TitokModel`] (TiTok, arXiv 2406.07550). The defaults are those of the released TiTok-L-32.

    Args:
        image_size: side of the pictures in pixels.
        patch_size, decoder_patch_size: pixels per side of a patch of encoder and decoder.
        num_latent_tokens: tokens of a picture.
        latent_channels: channels of a code or latent.
        quantization: "vq", tokens are ids of codes; "vae", tokens are latents.
        codebook_size, normalize_codes: number of codes; codes and latents are compared and used at unit length.
        latent_scale: factor that brings latents to unit standard deviation; "vae" only.
        legacy: as in the first release: the encoder's output is reshaped where it should be transposed, and the decoder
            predicts codes of another tokenizer, whose decoder draws the picture; otherwise it predicts pixels.
        pixel_decoder_config: configuration of that other tokenizer, a MaskGIT-VQGAN; with `legacy` only.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the encoder.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: the
            decoder; by default as the encoder.
        hidden_act, layer_norm_eps, hidden_dropout, attention_dropout: of both.
        in_channels: channels of the picture.
        commitment_loss_weight, kl_loss_weight: of the terms of the training loss.
        initializer_range: standard deviation of the weights.
    """

    model_type = "titok"
    sub_configs = {"pixel_decoder_config": AutoConfig}

    image_size: int = 256
    patch_size: int = 16
    decoder_patch_size: int | None = None
    num_latent_tokens: int = 32
    latent_channels: int = 12
    quantization: str = "vq"
    codebook_size: int = 4096
    normalize_codes: bool = True
    latent_scale: float = 1.0
    legacy: bool = True
    pixel_decoder_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int | None = None
    decoder_num_attention_heads: int | None = None
    decoder_intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    in_channels: int = 3
    commitment_loss_weight: float = 0.25
    kl_loss_weight: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name in SIZES:
            if getattr(self, f"decoder_{name}") is None:
                setattr(self, f"decoder_{name}", getattr(self, name))
            check_positive(self, (name, f"decoder_{name}"))
        self.decoder_patch_size = self.decoder_patch_size or self.patch_size
        sizes = ("image_size", "patch_size", "decoder_patch_size", "num_latent_tokens", "latent_channels")
        check_positive(self, (*sizes, "codebook_size", "in_channels"))
        check_shares(self, ("hidden_dropout", "attention_dropout"))
        for name in ("patch_size", "decoder_patch_size"):
            if self.image_size % getattr(self, name):
                raise ValueError(
                    f"image_size={self.image_size} is not a multiple of {name}={getattr(self, name)}."
                )
        for part in ("", "decoder_"):
            width, heads = getattr(self, f"{part}hidden_size"), getattr(self, f"{part}num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"{part}hidden_size={width} is not a multiple of {part}num_attention_heads={heads}."
                )
        if self.quantization not in ("vq", "vae"):
            raise ValueError(f"quantization is {self.quantization!r}; it must be 'vq' or 'vae'.")
        if not self.latent_scale > 0:
            raise ValueError(f"latent_scale is {self.latent_scale}; it must be above 0.")
        if self.legacy and self.pixel_decoder_config is None:
            self.pixel_decoder_config = {}
        self.pixel_decoder_config = as_config(self.pixel_decoder_config, MaskGitVQConfig)
        self._check_pixel_decoder()
        super().__post_init__(**kwargs)

    def _check_pixel_decoder(self) -> None:
        decoder = self.pixel_decoder_config
        if not self.legacy:
            if decoder is not None:
                raise ValueError(
                    "pixel_decoder_config is given, but only legacy=True draws by another tokenizer."
                )
            return
        if not isinstance(decoder, MaskGitVQConfig):
            raise ValueError(
                f"pixel_decoder_config is of type {decoder.model_type!r}; it must be of type 'maskgit_vq'."
            )
        if decoder.downsampling_factor != self.decoder_patch_size:
            raise ValueError(
                f"The pixel decoder draws {decoder.downsampling_factor} pixels a side for each of its codes; "
                f"decoder_patch_size is {self.decoder_patch_size}, and they must agree."
            )

    @property
    def downsampling_factor(self) -> int:
        """Pixels per side of a patch."""
        return self.patch_size
