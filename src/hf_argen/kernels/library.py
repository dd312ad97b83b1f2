"""What the operations share when they are registered with PyTorch."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

# torch.ops.hf_argen; repositories of kernels have another one, so that both can be loaded.
NAMESPACE = "hf_argen"

Launch = TypeVar("Launch", bound=Callable[..., Any])


def contiguous_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied unless its last dimension is contiguous; the strides of the others may be any."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def on_its_device(launch: Launch) -> Launch:
    """A function that launches kernels on the device of its first argument, which need not be the present one."""

    @functools.wraps(launch)
    def wrapped(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *arguments, **keywords)

    return wrapped  # type: ignore[return-value]
