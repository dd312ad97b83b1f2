"""Checks of what an operation is given: shapes, dtypes and devices, all known on the host, so that no GPU waits."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def same_device(operation: str, **tensors: torch.Tensor | None) -> None:
    """
    Raises:
        ValueError: the tensors are not on one device; `None` is on any.
    """
    first_name, first = next((name, one) for name, one in tensors.items() if one is not None)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{operation}: {name} is on {tensor.device} and {first_name} on {first.device}; move them to one device."
            )


def dtypes(operation: str, allowed: tuple[torch.dtype, ...], **tensors: torch.Tensor | None) -> None:
    """
    Raises:
        ValueError: a dtype that is not among the allowed ones.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            known = ", ".join(str(one).removeprefix("torch.") for one in allowed)
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype}; it must be {known}: convert it with .to()."
            )


def shape(operation: str, name: str, tensor: torch.Tensor | None, *expected: int | None) -> None:
    """
    Raises:
        ValueError: another shape than the expected one, of which `None` leaves a size open.
    """
    if tensor is None:
        return
    found = tuple(tensor.shape)
    if len(found) != len(expected) or any(e not in (None, f) for e, f in zip(expected, found, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{operation}: {name} has the shape {found}; it must be ({wanted}).")
