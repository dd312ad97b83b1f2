"""What the device at hand is good at."""

import platform
import warnings
from functools import cache

import torch


@cache
def cpu_has_float16() -> bool:
    """Whether this CPU multiplies float16 matrices by instructions of its own; without them it takes a thousand times longer."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN
        return False


def warn_of_slow_dtype(dtype: torch.dtype, device: torch.device, stacklevel: int) -> None:
    """Says so where a model was loaded in a type that its device can only emulate, and which type to take instead."""
    if device.type == "cpu" and dtype == torch.float16 and not cpu_has_float16():
        warnings.warn(
            "float16 is very slow on this CPU, which has no instructions for it; load the model with "
            "dtype=torch.bfloat16.",
            stacklevel=stacklevel + 1,
        )
