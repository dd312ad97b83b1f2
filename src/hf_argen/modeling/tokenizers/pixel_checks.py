"""What every convolutional tokenizer asks of pictures."""

from typing import Any

import torch


class PixelChecks:
    """Part of a tokenizer whose configuration has `in_channels` and `downsampling_factor`."""

    config: Any

    def check_pixels(self, pixel_values: torch.Tensor) -> None:
        """Refuses pictures of other channels, of whole numbers, or whose sides are no whole number of tokens."""
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
