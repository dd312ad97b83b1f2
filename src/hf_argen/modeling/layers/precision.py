"""Layers that stay in float32 while the model around them is float16 (`_keep_in_fp32_modules`)."""

import torch
from torch import nn


def suited(inputs: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """`inputs` in the dtype of the layer's weight; as they are if it is quantized, since such a layer casts by itself."""
    dtype = layer.weight.dtype
    return inputs.to(dtype) if dtype.is_floating_point else inputs
