"""Convolutional encoder and decoder of the VQGAN line (arXiv 2012.09841), shared by the VQ and KL tokenizers.

Shapes are channels first: (batch, channels, height, width). Every level but the lowest halves the resolution.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def laid_out(features: torch.Tensor) -> torch.Tensor:
    """The same with channels last in memory on a CPU, where convolutions then need no reordering of their input."""
    return (
        features.contiguous(memory_format=torch.channels_last) if features.device.type == "cpu" else features
    )


class ResnetBlock(nn.Module):
    """
    Two 3x3 convolutions behind group norms, with a 1x1 shortcut where the width changes.

    In `maskgit` form nothing has a bias, and the shortcut starts at the output of the second convolution, so that a block
    that changes the width drops its input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_num_groups: int,
        norm_eps: float,
        dropout: float,
        maskgit: bool = False,
    ):
        super().__init__()
        bias = not maskgit
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.drops_input = maskgit and in_channels != out_channels
        if in_channels == out_channels:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = nn.Conv2d(out_channels if maskgit else in_channels, out_channels, 1, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states), inplace=True))
        hidden_states = self.conv2(self.dropout(F.silu(self.norm2(hidden_states), inplace=True)))
        return self.shortcut(hidden_states if self.drops_input else residual) + hidden_states


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        # (batch, 1, positions, channels): one head
        query, key, value = (
            proj(normed).flatten(2).transpose(1, 2)[:, None] for proj in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended[:, 0].transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return hidden_states + self.proj(attended)


class Downsample(nn.Conv2d):
    """Halves the resolution with a strided 3x3 convolution, padded at the bottom and the right only."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the resolution by pixel repetition followed by a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    """Residual block, attention (unless switched off), residual block at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, norm_num_groups: int, norm_eps: float, dropout: float):
        super().__init__()
        self.resnet_1 = ResnetBlock(channels, channels, norm_num_groups, norm_eps, dropout)
        self.attention = SpatialAttention(channels, norm_num_groups, norm_eps) if attention else nn.Identity()
        self.resnet_2 = ResnetBlock(channels, channels, norm_num_groups, norm_eps, dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.resnet_2(self.attention(self.resnet_1(hidden_states)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked for, then the resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        attention: bool,
        norm_num_groups: int,
        norm_eps: float,
        dropout: float,
        maskgit: bool = False,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_blocks - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock(width, out_channels, norm_num_groups, norm_eps, dropout, maskgit) for width in widths
        )
        self.attentions = nn.ModuleList(
            SpatialAttention(out_channels, norm_num_groups, norm_eps)
            for _ in range(num_blocks if attention else 0)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states)
            if len(self.attentions) > 0:
                hidden_states = self.attentions[i](hidden_states)
        return hidden_states


def middle(
    channels: int, num_res_blocks: int, attention: bool, maskgit: bool, common: dict[str, Any]
) -> nn.Module:
    """What lies between encoder and decoder at the lowest resolution, on either side."""
    if maskgit:
        return Level(channels, channels, num_res_blocks, attention=False, maskgit=True, **common)
    return MidBlock(channels, attention, **common)


def levels_with_attention(given: Collection[int] | None, at_lowest: bool, lowest: int) -> Collection[int]:
    """The levels with attention: those that are given, otherwise the lowest or none."""
    if given is not None:
        return given
    return (lowest,) if at_lowest else ()


class ConvEncoder(nn.Module):
    """Pixels (batch, in_channels, H, W) to features (batch, out_channels, H / f, W / f), f = 2 ** (levels - 1).

    Args:
        in_channels: channels of the picture.
        out_channels: channels of the features.
        base_channels: width of the first level.
        channel_multiplier: width of each level in units of `base_channels`, from the highest resolution down.
        num_res_blocks: residual blocks per level.
        attention_at_lowest: attention in the middle and, without `attention_levels`, in the lowest level.
        norm_num_groups, norm_eps: of every group norm.
        dropout: inside the residual blocks.
        maskgit: the form of MaskGIT (arXiv 2202.04200): see [`ResnetBlock`]; no attention, `num_res_blocks` residual
            blocks in the middle, halving by averaging, no bias in the first convolution, the last one 1x1.
        attention_levels: the levels with attention after each of their residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base_channels: int,
        channel_multiplier: list[int],
        num_res_blocks: int,
        attention_at_lowest: bool,
        norm_num_groups: int,
        norm_eps: float,
        dropout: float,
        maskgit: bool = False,
        attention_levels: Collection[int] | None = None,
    ):
        super().__init__()
        common = {"norm_num_groups": norm_num_groups, "norm_eps": norm_eps, "dropout": dropout}
        widths = [base_channels * multiplier for multiplier in channel_multiplier]
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1, bias=not maskgit)
        self.down_blocks = nn.ModuleList()
        last, previous = len(widths) - 1, base_channels
        attended = levels_with_attention(attention_levels, attention_at_lowest, last)
        for i, width in enumerate(widths):
            level = Level(previous, width, num_res_blocks, i in attended, maskgit=maskgit, **common)
            if i != last:
                level.downsample = nn.AvgPool2d(2) if maskgit else Downsample(width)
            self.down_blocks.append(level)
            previous = width
        self.mid_block = middle(widths[-1], num_res_blocks, attention_at_lowest, maskgit, common)
        self.norm_out = nn.GroupNorm(norm_num_groups, widths[-1], eps=norm_eps)
        kernel = 1 if maskgit else 3
        self.conv_out = nn.Conv2d(widths[-1], out_channels, kernel, padding=kernel // 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(laid_out(pixel_values))
        for level in self.down_blocks:
            hidden_states = level(hidden_states)
            if hasattr(level, "downsample"):
                hidden_states = level.downsample(hidden_states)
        hidden_states = self.mid_block(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states), inplace=True))


class ConvDecoder(nn.Module):
    """Features (batch, in_channels, h, w) to pixels (batch, out_channels, h * f, w * f); mirrors [`ConvEncoder`].

    `up_blocks[0]` is the highest resolution and runs last; each level has one residual block more than the encoder's,
    with `maskgit` as many.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        base_channels: int,
        channel_multiplier: list[int],
        num_res_blocks: int,
        attention_at_lowest: bool,
        norm_num_groups: int,
        norm_eps: float,
        dropout: float,
        maskgit: bool = False,
        attention_levels: Collection[int] | None = None,
    ):
        super().__init__()
        common = {"norm_num_groups": norm_num_groups, "norm_eps": norm_eps, "dropout": dropout}
        widths = [base_channels * multiplier for multiplier in channel_multiplier]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid_block = middle(widths[-1], num_res_blocks, attention_at_lowest, maskgit, common)
        self.up_blocks = nn.ModuleList()
        last, num_blocks = len(widths) - 1, num_res_blocks + (not maskgit)
        attended = levels_with_attention(attention_levels, attention_at_lowest, last)
        for i, width in enumerate(widths):
            previous = widths[min(i + 1, last)]
            level = Level(previous, width, num_blocks, i in attended, maskgit=maskgit, **common)
            if i != 0:
                level.upsample = Upsample(width)
            self.up_blocks.append(level)
        self.norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mid_block(self.conv_in(laid_out(latents)))
        for level in reversed(self.up_blocks):
            hidden_states = level(hidden_states)
            if hasattr(level, "upsample"):
                hidden_states = level.upsample(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states), inplace=True))
