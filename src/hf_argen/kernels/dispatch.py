"""Which implementation of an operation runs: the reference in plain PyTorch, or the Triton kernel."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .bounds import prefers_reference
from .checks import FLOATS

VARIABLE = "HF_ARGEN_KERNELS"
MODES = ("auto", "reference", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETS = os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "on",
    "yes",
)  # as Triton reads it


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{VARIABLE} is {mode!r}; it must be one of {', '.join(MODES)}.")
    if mode == "triton" and not HAS_TRITON:
        raise ImportError(
            f"{VARIABLE} is 'triton', but Triton is not installed: pip install 'hf-argen[kernels]', or use 'auto'."
        )
    return mode


_mode = _checked(os.environ.get(VARIABLE, "auto"))


def mode() -> str:
    """
    "auto": kernels on a GPU where Triton is installed, for shapes of which it is not known that the reference is faster;
    "reference": never; "triton": always.
    """
    return _mode


@contextmanager
def use(mode: str) -> Iterator[None]:
    """
    Within the `with` block, `mode` takes the place of `HF_ARGEN_KERNELS`, which is read once, at import.

    Raises:
        ValueError: unknown mode.
        ImportError: "triton" without Triton.
    """
    global _mode
    before, _mode = _mode, _checked(mode)
    try:
        yield
    finally:
        _mode = before


def may_run(tensor: torch.Tensor) -> bool:
    """Whether a kernel may run on this tensor, whatever the operation: what is asked first, since on a CPU calls count."""
    return tensor.is_cuda or _mode == "triton"


def runs_kernel(tensor: torch.Tensor, operation: str, **sizes: int) -> bool:
    """
    Whether an operation on this tensor runs as a kernel: float32, bfloat16 or float16 on a GPU. On a CPU "triton" means
    Triton's interpreter.

    Args:
        operation, sizes: which, and how large it is, by the names in `bounds.SIZES`.

    Raises:
        RuntimeError: "triton" for a tensor on a CPU, without the interpreter.
    """
    if tensor.is_cuda:  # true on AMD's GPUs, too
        if _mode == "reference" or not HAS_TRITON or tensor.dtype not in FLOATS:
            return False
        return _mode == "triton" or not prefers_reference(operation, tensor.device, sizes)
    if _mode != "triton" or tensor.device.type != "cpu" or tensor.dtype not in FLOATS:
        return False
    if not INTERPRETS:
        raise RuntimeError(
            f"{VARIABLE} is 'triton' and the tensors are on the CPU; kernels run there only under Triton's interpreter: "
            f"set TRITON_INTERPRET=1 before Python starts, or use {VARIABLE}=auto."
        )
    return True
