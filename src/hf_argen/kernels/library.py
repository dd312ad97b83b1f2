"""What the operations share when they are registered with PyTorch."""

import torch

NAMESPACE = (
    "hf_argen"  # torch.ops.hf_argen; another one in repositories of kernels, so that both can be loaded
)


def contiguous_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied unless its last dimension is contiguous; the strides of the others may be any."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
