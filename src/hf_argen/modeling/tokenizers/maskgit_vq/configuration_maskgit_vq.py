"""Configuration of the MaskGIT-VQGAN tokenizer."""

from typing import Any

from transformers import PreTrainedConfig

from ...config_checks import check_norm_groups, check_positive, check_shares
from ..configuration_grid import GridTokenizerConfigMixin, normalize_grid


class MaskGitVQConfig(GridTokenizerConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`MaskGitVQModel`] (MaskGIT, arXiv 2202.04200, as in RAR, arXiv 2411.00776). The defaults are those
    of the released tokenizer.

    Args:
        codebook_size: number of codes.
        codebook_dim: channels of a code, and of what encoder and decoder exchange.
        base_channels: width of the first level of encoder and decoder.
        channel_multiplier: width of each level in units of `base_channels`, from the highest resolution down; its
            length fixes the downsampling factor 2 ** (levels - 1).
        num_res_blocks: residual blocks per level and in the middle.
        norm_num_groups, norm_eps: of every group norm.
        dropout: inside the residual blocks, in training.
        in_channels: channels of the picture.
        grid_size: side of the token grid, or `[height, width]`; `None` takes pictures of any size.
        codebook_loss_weight, commitment_loss_weight: of the terms of the training loss.
    """

    model_type = "maskgit_vq"

    codebook_size: int = 1024
    codebook_dim: int = 256
    base_channels: int = 128
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    in_channels: int = 3
    grid_size: int | list[int] | tuple[int, ...] | None = None
    codebook_loss_weight: float = 0.25
    commitment_loss_weight: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.channel_multiplier = list(self.channel_multiplier)
        self.grid_size = normalize_grid(self.grid_size)
        sizes = ("codebook_size", "codebook_dim", "base_channels", "num_res_blocks", "in_channels")
        check_positive(self, (*sizes, "norm_num_groups"))
        check_shares(self, ("dropout",))
        check_norm_groups(self, self.channel_multiplier)
        super().__post_init__(**kwargs)
