"""A codebook of vectors and nearest-neighbour quantization (VQ-VAE, arXiv 1711.00937)."""

import torch
import torch.nn.functional as F
from torch import nn


class Codebook(nn.Module):
    """
    Maps latents (batch, h, w, channels) to ids and back, in float32.

    Args:
        size: number of codes.
        dim: channels of a code.
        normalize: latents and codes are brought to unit length whenever they are used.
    """

    def __init__(self, size: int, dim: int, normalize: bool = False):
        super().__init__()
        self.normalize = normalize
        self.embedding = nn.Embedding(size, dim)

    def codes(self, device: torch.device | None = None) -> torch.Tensor:
        """All codes as they are used, (size, dim) float32."""
        return self.embed(torch.arange(self.embedding.num_embeddings, device=device))

    def unit(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors of unit length, where codes are normalised."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (...) to codes (..., dim) float32, on the device of the ids wherever the weights are."""
        return self.unit(self.embedding(ids).float().to(ids.device))

    def distances(self, latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Squared distances of latents (n, channels) to all codes, (n, size)."""
        squares = latents.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
        return squares - 2 * latents @ codes.t()

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """Ids (batch, h, w) of the codes that are nearest to the latents, of equally near ones the first."""
        latents = self.unit(latents.float())
        return (
            self.distances(latents.flatten(0, -2), self.codes(latents.device))
            .argmin(dim=1)
            .view(latents.shape[:-1])
        )

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Returns:
            codes in place of the latents with straight-through gradients; mean squared distance of the codes to the
            latents, which stand still; the same with the codes standing still; distances (n, size) to all codes.
        """
        latents, codes = self.unit(latents.float()), self.codes(latents.device)
        distances = self.distances(latents.flatten(0, -2), codes)
        nearest = codes[distances.argmin(dim=1)].view(latents.shape)
        codebook_loss = F.mse_loss(nearest, latents.detach())
        commitment_loss = F.mse_loss(latents, nearest.detach())
        return latents + (nearest - latents).detach(), codebook_loss, commitment_loss, distances
