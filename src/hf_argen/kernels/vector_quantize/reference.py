"""Nearest codes and sign codes in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F


def nearest_codes(vectors: torch.Tensor, codes: torch.Tensor, metric: str = "l2") -> torch.Tensor:
    """See [`hf_argen.kernels.vector_quantize.nearest_codes`]."""
    vectors, codes = vectors.float(), codes.float()
    if metric == "cosine":
        return torch.argmax(F.normalize(vectors, dim=-1) @ F.normalize(codes.T, dim=0), dim=1)
    distances = vectors.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
    return torch.argmin(distances.addmm_(vectors, codes.T, alpha=-2, beta=1), dim=1)


def nearest_codes_of_scale(
    residual: torch.Tensor, codes: torch.Tensor, size: tuple[int, int], metric: str = "l2"
) -> torch.Tensor:
    """See [`hf_argen.kernels.vector_quantize.nearest_codes_of_scale`]."""
    if tuple(residual.shape[2:]) != tuple(size):
        residual = F.interpolate(residual, size=size, mode="area")
    vectors = residual.permute(0, 2, 3, 1).reshape(-1, residual.shape[1])
    return nearest_codes(vectors, codes, metric).view(len(residual), -1)


def vector_quantize(
    vectors: torch.Tensor, codes: torch.Tensor, metric: str = "l2"
) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`hf_argen.kernels.vector_quantize.vector_quantize`]."""
    with torch.no_grad():
        ids = nearest_codes(vectors, codes, metric)
        nearest = F.embedding(ids, codes).to(vectors.dtype)
        step = nearest - vectors
    return vectors + step, ids


def sign_quantize(latents: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`hf_argen.kernels.vector_quantize.sign_quantize`]."""
    with torch.no_grad():
        bits = latents > 0
        places = torch.arange(latents.shape[-1] - 1, -1, -1, device=latents.device)
        ids = (bits.long() << places).sum(dim=-1)
        step = torch.where(bits, scale, -scale).to(latents.dtype) - latents
    return latents + step, ids
