"""Configuration of the multi-scale residual VQ-VAE."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from transformers import PreTrainedConfig

from ...config_checks import check_norm_groups, check_positive, check_shares


class MultiScaleVQConfig(PreTrainedConfig):
    r"""
    Configuration of [`MultiScaleVQModel`], the visual tokenizer of VAR (arXiv 2404.02905). The defaults are those of
    the released tokenizer `vae_ch160v4096z32.pth`.

    Args:
        codebook_size: number of codes V, shared by all scales.
        latent_channels: channels of the latent map and of each code.
        base_channels: width of the first level of encoder and decoder.
        channel_multiplier: width of each level in units of `base_channels`; its length fixes the downsampling factor
            patch_size * 2 ** (levels - 1).
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
        norm_num_groups, norm_eps: of every group norm.
        dropout: inside the residual blocks, in training.
        in_channels: channels of the picture.
        patch_size: side of the squares of pixels that the encoder takes as one cell (their values become channels) and
            the decoder gives back; 1 in VAR. Larger ones make a small tokenizer fast.
        attention_at_lowest: self-attention at the lowest resolution and in the middle.
        patch_nums: side of the token grid of each scale, from coarse to fine; `n` stands for `[n, n]`.
        num_residual_convs: convolutions phi that follow the upsampling of a scale: 0 for none, 1 shared by all
            scales, the number of scales for one each, anything between for partial sharing.
        residual_conv_ratio: share r of phi(h) = (1 - r) h + r conv(h).
        normalize_codes: nearest code by cosine instead of Euclidean distance.
        quant_conv_kernel_size: kernel of the convolutions before and after quantization.
        commitment_loss_weight: weight beta of the commitment term of the training loss.
        initializer_range: standard deviation of the codebook at initialisation.
    """

    model_type = "multiscale_vq"

    codebook_size: int = 4096
    latent_channels: int = 32
    base_channels: int = 160
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    in_channels: int = 3
    patch_size: int = 1
    attention_at_lowest: bool = True
    patch_nums: list | tuple = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    num_residual_convs: int = 4
    residual_conv_ratio: float = 0.5
    normalize_codes: bool = False
    quant_conv_kernel_size: int = 3
    commitment_loss_weight: float = 0.25
    initializer_range: float = 0.2

    def __post_init__(self, **kwargs: Any) -> None:
        self.channel_multiplier = list(self.channel_multiplier)
        self.patch_nums = normalize_patch_nums(self.patch_nums)
        sizes = ("codebook_size", "latent_channels", "base_channels", "num_res_blocks", "norm_num_groups")
        check_positive(self, (*sizes, "in_channels", "patch_size", "quant_conv_kernel_size"))
        check_shares(self, ("residual_conv_ratio", "dropout"))
        if not self.channel_multiplier:
            raise ValueError("channel_multiplier is empty; give the width of at least one level.")
        if self.quant_conv_kernel_size % 2 == 0:
            raise ValueError(f"quant_conv_kernel_size is {self.quant_conv_kernel_size}; it must be odd.")
        if self.num_residual_convs < 0:
            raise ValueError(f"num_residual_convs is {self.num_residual_convs}; it must be 0 or above.")
        check_norm_groups(self, self.channel_multiplier)
        super().__post_init__(**kwargs)

    @property
    def downsampling_factor(self) -> int:
        """Pixels per side of one cell of the last grid."""
        return self.patch_size * 2 ** (len(self.channel_multiplier) - 1)

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the token grid of each scale."""
        return grid_sizes(self.patch_nums)


def normalize_patch_nums(patch_nums: Any) -> list[int | list[int]]:
    """
    Checks a list of scales and brings it into the form that is stored: `n` for a square grid, `[h, w]` otherwise.

    Raises:
        ValueError: no scale, or one that is neither `n` nor `[h, w]`.
    """
    if not isinstance(patch_nums, Sequence) or isinstance(patch_nums, str) or not patch_nums:
        raise ValueError(
            f"patch_nums is {patch_nums!r}; give a list with the side of at least one token grid."
        )
    scales: list[int | list[int]] = []
    for patch_num in patch_nums:
        sides = [patch_num, patch_num] if isinstance(patch_num, Integral) else patch_num
        is_grid = isinstance(sides, Sequence) and len(sides) == 2
        if not is_grid or not all(
            isinstance(side, Integral) and not isinstance(side, bool) and side >= 1 for side in sides
        ):
            raise ValueError(
                f"patch_nums holds the scale {patch_num!r}; a scale is n or [height, width], every side at least 1."
            )
        height, width = map(int, sides)
        scales.append(height if height == width else [height, width])
    return scales


def grid_sizes(patch_nums: list) -> list[tuple[int, int]]:
    """(height, width) of each scale of a list in which `n` stands for `[n, n]`."""
    return [(n, n) if isinstance(n, int) else (n[0], n[1]) for n in patch_nums]
