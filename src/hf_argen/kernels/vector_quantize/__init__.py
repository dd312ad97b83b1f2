"""
Vectors to codes: the nearest one of a codebook (VQ-VAE, arXiv 1711.00937), of the residual of a scale (VAR, arXiv
2404.02905), and sign codes (LFQ, arXiv 2310.05737; BSQ, arXiv 2406.07548).
"""

from typing import Any

import torch
import torch.nn.functional as F

from .. import checks
from ..dispatch import runs_kernel
from ..library import NAMESPACE, contiguous_rows
from . import reference

__all__ = ["nearest_codes", "nearest_codes_of_scale", "sign_quantize", "vector_quantize"]

NAME = "vector_quantize"
METRICS = ("l2", "cosine")
MOST_BITS = 62  # that an int64 holds


def nearest_codes(vectors: torch.Tensor, codes: torch.Tensor, metric: str = "l2") -> torch.Tensor:
    """
    Args:
        vectors: (n, channels) float32, bfloat16 or float16; computed in float32.
        codes: (size, channels).
        metric: "l2", or "cosine" for the largest cosine.

    Returns:
        (n,) int64, the nearest code of each vector, of equally near ones the first; without gradient.

    Raises:
        ValueError: an unknown metric, an empty codebook, channels, dtypes or devices that do not fit.
    """
    checks.shape(NAME, "vectors", vectors, None, None)
    _check(vectors, codes, metric)
    if not _runs_here(vectors, len(vectors), codes):
        return reference.nearest_codes(vectors, codes, metric)
    return _nearest_operation(vectors.detach(), codes.detach(), metric, [])


def nearest_codes_of_scale(
    residual: torch.Tensor, codes: torch.Tensor, size: tuple[int, int], metric: str = "l2"
) -> torch.Tensor:
    """
    The codes of one scale of a multi-scale quantizer: what is left of a latent map, averaged down to the grid of the
    scale, to its nearest codes.

    Args:
        residual: (batch, channels, height, width).
        codes, metric: as in [`nearest_codes`].
        size: rows and columns of the grid, not more than height and width.

    Returns:
        (batch, rows * columns) int64.
    """
    checks.shape(NAME, "residual", residual, None, None, None, None)
    _check(residual, codes, metric)
    is_smaller = all(own >= other for own, other in zip(residual.shape[2:], size, strict=True))
    if not (is_smaller and _runs_here(residual, len(residual) * size[0] * size[1], codes)):
        return reference.nearest_codes_of_scale(residual, codes, size, metric)
    ids = _nearest_operation(residual.detach(), codes.detach(), metric, list(size))
    return ids.view(len(residual), size[0] * size[1])


def vector_quantize(
    vectors: torch.Tensor, codes: torch.Tensor, metric: str = "l2"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns:
        the nearest codes (n, channels) in the dtype of the vectors, whose gradient passes straight through to these, and
        their ids (n,) int64. See [`nearest_codes`].
    """
    checks.shape(NAME, "vectors", vectors, None, None)
    _check(vectors, codes, metric)
    if not _runs_here(vectors, len(vectors), codes):
        return reference.vector_quantize(vectors, codes, metric)
    return _quantize_operation(vectors, codes.detach(), metric)


def sign_quantize(latents: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        latents: (n, bits), up to 62 bits.
        scale: size of the codes: 1 for LFQ, 1 / sqrt(bits) for BSQ, whose latents are of unit length.

    Returns:
        codes (n, bits), `scale` where a latent is above 0 and -`scale` elsewhere, with straight-through gradients; ids (n,)
        int64, the first bit being the most significant one.
    """
    checks.shape(NAME, "latents", latents, None, None)
    checks.dtypes(NAME, checks.FLOATS, latents=latents)
    if not 1 <= latents.shape[1] <= MOST_BITS:
        raise ValueError(
            f"{NAME}: latents have {latents.shape[1]} bits; it must be 1 to {MOST_BITS}, to be one number."
        )
    if not runs_kernel(latents, "sign_quantize"):
        return reference.sign_quantize(latents, scale)
    return _sign_operation(latents, scale)


def _runs_here(vectors: torch.Tensor, rows: int, codes: torch.Tensor) -> bool:
    size, channels = codes.shape
    return runs_kernel(vectors, NAME, rows=rows, codes=size, channels=channels)


def _check(vectors: torch.Tensor, codes: torch.Tensor, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"{NAME}: metric is {metric!r}; it must be one of {', '.join(METRICS)}.")
    checks.shape(NAME, "codes", codes, None, None)
    if codes.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"{NAME}: vectors have {vectors.shape[1]} channels and codes {codes.shape[1]}; they belong to another codebook."
        )
    if len(codes) == 0:
        raise ValueError(f"{NAME}: the codebook is empty; give at least one code.")
    checks.dtypes(NAME, checks.FLOATS, vectors=vectors, codes=codes)
    checks.same_device(NAME, vectors=vectors, codes=codes)


@torch.library.custom_op(f"{NAMESPACE}::nearest_codes", mutates_args=())
def _nearest_operation(
    vectors: torch.Tensor, codes: torch.Tensor, metric: str, size: list[int]
) -> torch.Tensor:
    from . import triton

    return triton.nearest(vectors, contiguous_rows(codes), metric, tuple(size) if size else None)


@_nearest_operation.register_fake
def _nearest_output(vectors: torch.Tensor, codes: torch.Tensor, metric: str, size: list[int]) -> torch.Tensor:
    count = vectors.shape[0] * size[0] * size[1] if size else vectors.shape[0]
    return vectors.new_empty((count,), dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::vector_quantize", mutates_args=())
def _quantize_operation(
    vectors: torch.Tensor, codes: torch.Tensor, metric: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import triton

    ids = triton.nearest(vectors, contiguous_rows(codes), metric)
    return F.embedding(ids, codes).to(vectors.dtype), ids


@_quantize_operation.register_fake
def _quantized(vectors: torch.Tensor, codes: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    return vectors.new_empty(vectors.shape), vectors.new_empty((vectors.shape[0],), dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::sign_quantize", mutates_args=())
def _sign_operation(latents: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    from . import triton

    return triton.signs(latents.contiguous(), scale)


@_sign_operation.register_fake
def _signed(latents: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return latents.new_empty(latents.shape), latents.new_empty((latents.shape[0],), dtype=torch.int64)


def _straight_through_to_vectors(ctx: Any, d_codes: torch.Tensor, d_ids: None) -> tuple:
    return d_codes, None, None


def _straight_through_to_latents(ctx: Any, d_codes: torch.Tensor, d_ids: None) -> tuple:
    return d_codes, None


torch.library.register_autograd(f"{NAMESPACE}::vector_quantize", _straight_through_to_vectors)
torch.library.register_autograd(f"{NAMESPACE}::sign_quantize", _straight_through_to_latents)
