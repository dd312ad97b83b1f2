"""A codebook of vectors and nearest-neighbour quantization (VQ-VAE, arXiv 1711.00937)."""

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.vector_quantize import nearest_codes


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
        """Ids (...) of the codes nearest to the latents (..., channels), of equally near ones the first."""
        latents = self.unit(latents.float())
        return nearest_codes(latents.flatten(0, -2), self.codes(latents.device)).view(latents.shape[:-1])

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

    @torch.no_grad()
    def revive_codes(self, latents: torch.Tensor, min_share: float = 0.1) -> torch.LongTensor:
        """
        Replaces codes that are hardly drawn by latents of the batch (random restarts, arXiv 2005.00341).

        Args:
            latents: (batch, channels, h, w) of training pictures, enough of them that a code in use is drawn often.
            min_share: a code is dead if it is drawn less than this share of what equal use of all codes would give.

        Returns:
            Indices (n,) of the replaced codes; the optimizer's moments for these rows of `embedding` are stale.
        """
        vectors = self.unit(latents.float().permute(0, 2, 3, 1).flatten(0, 2))
        size = self.embedding.num_embeddings
        drawn = torch.bincount(self.nearest(vectors), minlength=size)
        dead = (drawn <= min_share * len(vectors) / size).nonzero().flatten()[: len(vectors)]
        chosen = vectors[torch.randperm(len(vectors))[: len(dead)].to(vectors.device)]
        self.embedding.weight[dead] = chosen.to(self.embedding.weight.dtype)
        return dead
