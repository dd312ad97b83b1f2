"""Configuration of LlamaGen's VQ tokenizer."""

from typing import Any

from transformers import PreTrainedConfig

from ...config_checks import check_norm_groups, check_positive, check_shares
from ..configuration_grid import GridTokenizerConfigMixin, normalize_grid


class LlamaGenVQConfig(GridTokenizerConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`LlamaGenVQModel`] (LlamaGen, arXiv 2406.06525). The defaults are those of the released VQ-16;
    VQ-8 has the channel multiplier (1, 2, 2, 4).

    Args:
        codebook_size: number of codes.
        codebook_dim: channels of a code.
        normalize_codes: latents and codes are brought to unit length before they are compared and whenever a code is
            looked up; the stored codes need not be.
        latent_channels: channels between encoder or decoder and the 1x1 convolutions around the codebook.
        base_channels: width of the first level of encoder and decoder.
        channel_multiplier: width of each level in units of `base_channels`, from the highest resolution down; its
            length fixes the downsampling factor 2 ** (levels - 1).
        decoder_channel_multiplier: the same for the decoder; default: that of the encoder.
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
        norm_num_groups, norm_eps: of every group norm.
        dropout: inside the residual blocks, in training.
        in_channels: channels of the picture.
        grid_size: side of the token grid, or `[height, width]`; `None` takes pictures of any size.
        commitment_loss_weight, entropy_loss_weight: of the terms of the training loss.
    """

    model_type = "llamagen_vq"

    codebook_size: int = 16384
    codebook_dim: int = 8
    normalize_codes: bool = True
    latent_channels: int = 256
    base_channels: int = 128
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_channel_multiplier: list[int] | tuple[int, ...] | None = None
    num_res_blocks: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    in_channels: int = 3
    grid_size: int | list[int] | tuple[int, ...] | None = None
    commitment_loss_weight: float = 0.25
    entropy_loss_weight: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.channel_multiplier = list(self.channel_multiplier)
        self.decoder_channel_multiplier = list(self.decoder_channel_multiplier or self.channel_multiplier)
        self.grid_size = normalize_grid(self.grid_size)
        sizes = (
            "codebook_size",
            "codebook_dim",
            "latent_channels",
            "base_channels",
            "num_res_blocks",
            "in_channels",
        )
        check_positive(self, (*sizes, "norm_num_groups"))
        check_shares(self, ("dropout",))
        if len(self.channel_multiplier) != len(self.decoder_channel_multiplier):
            raise ValueError(
                f"channel_multiplier has {len(self.channel_multiplier)} levels and decoder_channel_multiplier "
                f"{len(self.decoder_channel_multiplier)}; they must be as many."
            )
        check_norm_groups(self, self.channel_multiplier + self.decoder_channel_multiplier)
        super().__post_init__(**kwargs)
