"""The residual quantizer of VAR: a latent map as a sum of upsampled code maps, coarse to fine (arXiv 2404.02905)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ....kernels.vector_quantize import nearest_codes_of_scale
from .configuration_multiscale_vq import MultiScaleVQConfig

Grid = tuple[int, int]


class ResidualConv(nn.Conv2d):
    """phi(h) = (1 - r) h + r conv3x3(h), which repairs what upsampling a coarse grid loses."""

    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        convolved = super().forward(features.to(self.weight.dtype)).to(features.dtype)
        return features * (1 - self.ratio) + convolved * self.ratio


class MultiScaleQuantizer(nn.Module):
    """
    Codebook and residual convolutions. All arithmetic is float32, whatever the weights are stored in.

    A *feature map* is the float32 sum (batch, channels, h, w), at the size of the last scale, of what the scales so
    far have contributed. Results are on the device of what they are made from, wherever the weights are.
    """

    def __init__(self, config: MultiScaleVQConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.latent_channels)
        self.residual_convs = nn.ModuleList(
            ResidualConv(config.latent_channels, config.residual_conv_ratio)
            for _ in range(config.num_residual_convs)
        )
        # How often each code is drawn per batch, averaged over training; a statistic, not used by the arithmetic.
        self.register_buffer("code_usage", torch.zeros(len(config.patch_nums), config.codebook_size))

    def codebook(self, device: torch.device | None = None) -> torch.Tensor:
        """All codes (codebook_size, channels) float32; looked up through the module so that offloaded weights work."""
        return self.embed(torch.arange(self.config.codebook_size, device=device))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (batch, n) to their codes (batch, n, channels) float32."""
        return self.embedding(ids).float().to(ids.device)

    def residual_conv(self, features: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
        """Applies the convolution whose place on the coarse-to-fine axis is nearest to this scale's."""
        count = len(self.residual_convs)
        if count == 0:
            return features
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        ticks = np.linspace(margin, 1 - margin, count)
        place = step / (num_steps - 1) if num_steps > 1 else 0.0
        return self.residual_convs[int(np.argmin(np.abs(ticks - place)))](features).to(features.device)

    def new_feature_map(self, batch_size: int, size: Grid, device: torch.device) -> torch.Tensor:
        """A feature map to which no scale has contributed yet."""
        return torch.zeros(batch_size, self.config.latent_channels, *size, dtype=torch.float32, device=device)

    def contribution(self, codes: torch.Tensor, step: int, grids: list[Grid]) -> torch.Tensor:
        """What scale `step` adds to the feature map, from its codes (batch, h * w, channels)."""
        height, width = grids[step]
        code_map = codes.transpose(1, 2).reshape(codes.shape[0], -1, height, width)
        if step != len(grids) - 1:
            code_map = F.interpolate(code_map, size=grids[-1], mode="bicubic")
        return self.residual_conv(code_map, step, len(grids))

    def scale_input(self, feature_map: torch.Tensor, size: Grid) -> torch.Tensor:
        """The feature map averaged down to the grid of the next scale, (batch, h * w, channels): the model's input."""
        return F.interpolate(feature_map, size=size, mode="area").flatten(2).transpose(1, 2)

    @staticmethod
    def _vectors(residual: torch.Tensor, size: Grid, is_last: bool) -> torch.Tensor:
        """The cells (batch * h * w, channels) of a residual, averaged down to the grid of a scale."""
        pooled = residual if is_last else F.interpolate(residual, size=size, mode="area")
        return pooled.permute(0, 2, 3, 1).reshape(-1, residual.shape[1])

    def _scale_ids(
        self, residual: torch.Tensor, size: Grid, is_last: bool, codebook: torch.Tensor
    ) -> torch.Tensor:
        """The nearest codes (batch, cells) of the residual on the grid of a scale."""
        size = tuple(residual.shape[2:]) if is_last else size
        return nearest_codes_of_scale(
            residual, codebook, size, "cosine" if self.config.normalize_codes else "l2"
        )

    @torch.no_grad()
    def quantize(
        self, latents: torch.Tensor, grids: list[Grid] | None = None
    ) -> tuple[torch.LongTensor, list[torch.Tensor]]:
        """
        Explains a latent map (batch, channels, h, w) scale by scale.

        Returns:
            ids (batch, tokens) of all scales, and the feature map after each scale.
        """
        grids = grids or self.config.grid_sizes
        residual = latents.float().clone()
        codebook = self.codebook(latents.device)
        feature_map = torch.zeros_like(residual)
        ids, feature_maps = [], []
        for step, size in enumerate(grids):
            scale_ids = self._scale_ids(residual, size, step == len(grids) - 1, codebook)
            contribution = self.contribution(self.embed(scale_ids), step, grids)
            feature_map = feature_map + contribution
            residual = residual - contribution
            ids.append(scale_ids)
            feature_maps.append(feature_map)
        return torch.cat(ids, dim=1), feature_maps

    def split(
        self, ids: torch.Tensor, grids: list[Grid] | None = None, partial: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """
        Ids (batch, tokens) into one tensor (batch, h * w) per scale, after a check of number and range. With
        `partial` the ids may stop after any scale.
        """
        grids = grids or self.config.grid_sizes
        lengths = [height * width for height, width in grids]
        ends = np.cumsum(lengths).tolist()
        if ids.ndim != 2 or ids.shape[1] not in (ends if partial else ends[-1:]):
            counts = f"one of {ends}" if partial else ends[-1]
            raise ValueError(
                f"ids have the shape {tuple(ids.shape)}; the scales {grids} need (batch, {counts})."
            )
        if ids.is_floating_point():
            raise ValueError(f"ids are {ids.dtype}; give whole numbers.")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.codebook_size:
            raise ValueError(
                f"ids lie in [{int(ids.min())}, {int(ids.max())}]; the codebook has {self.config.codebook_size} codes."
            )
        return ids.split(lengths[: ends.index(ids.shape[1]) + 1], dim=1)

    def feature_maps(
        self, ids: torch.Tensor, grids: list[Grid] | None = None, progressive: bool = False
    ) -> list:
        """
        The feature map after each scale, from ids (batch, tokens).

        Args:
            progressive: keep each map at the size of its own scale, enlarging the sum from scale to scale, instead of
                bringing every scale to the last size. The tokenizer was not trained for it; it gives small previews.
        """
        grids = grids or self.config.grid_sizes
        size = grids[0] if progressive else grids[-1]
        feature_map = self.new_feature_map(ids.shape[0], size, ids.device)
        maps = []
        for step, scale_ids in enumerate(self.split(ids, grids)):
            codes = self.embed(scale_ids)
            if progressive:
                code_map = codes.transpose(1, 2).reshape(ids.shape[0], -1, *grids[step])
                feature_map = F.interpolate(feature_map, size=grids[step], mode="bicubic")
                feature_map = feature_map + self.residual_conv(code_map, step, len(grids))
            else:
                feature_map = feature_map + self.contribution(codes, step, grids)
            maps.append(feature_map)
        return maps

    @torch.no_grad()
    def scale_inputs(self, ids: torch.Tensor, grids: list[Grid] | None = None) -> torch.Tensor:
        """
        Teacher-forcing input of a next-scale model: for every scale but the first, the feature map of the scales
        before it at its own size.

        Args:
            ids: (batch, tokens), of all scales or of the first few.

        Returns:
            (batch, tokens of these scales but the first, channels) float32.
        """
        grids = grids or self.config.grid_sizes
        feature_map = self.new_feature_map(ids.shape[0], grids[-1], ids.device)
        inputs = [feature_map.new_zeros(ids.shape[0], 0, self.config.latent_channels)]
        for step, scale_ids in enumerate(self.split(ids, grids, partial=True)[:-1]):
            feature_map = feature_map + self.contribution(self.embed(scale_ids), step, grids)
            inputs.append(self.scale_input(feature_map, grids[step + 1]))
        return torch.cat(inputs, dim=1)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Training pass over float32 latents (batch, channels, h, w).

        Returns:
            The quantized feature map, whose gradient passes straight through to `latents`, and the loss: the mean
            over the scales of beta * |sg(q) - z|^2 + |q - sg(z)|^2.
        """
        grids = [*self.config.grid_sizes[:-1], (latents.shape[2], latents.shape[3])]
        target = latents.detach()
        residual, feature_map = target.clone(), torch.zeros_like(target)
        codebook = self.codebook(latents.device).detach()
        loss = latents.new_zeros(())
        for step, size in enumerate(grids):
            ids = self._scale_ids(residual, size, step == len(grids) - 1, codebook)
            if self.training:
                self._count(ids, step)
            contribution = self.contribution(self.embed(ids), step, grids)
            feature_map = feature_map + contribution
            residual = residual - contribution.detach()
            commitment = F.mse_loss(feature_map.detach(), latents)
            loss = loss + self.config.commitment_loss_weight * commitment + F.mse_loss(feature_map, target)
        return (feature_map.detach() - target) + latents, loss / len(grids)

    @torch.no_grad()
    def _count(self, ids: torch.Tensor, step: int) -> None:
        hits = torch.bincount(ids.reshape(-1), minlength=self.config.codebook_size).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(hits)
        usage = self.code_usage[step]
        is_first = (usage.sum() == 0).float()
        usage.lerp_(hits.to(usage.dtype), is_first + (1 - is_first) * 0.01)

    @torch.no_grad()
    def revive_codes(self, latents: torch.Tensor, min_share: float = 0.1) -> torch.LongTensor:
        """
        Replaces codes that training hardly draws by residuals of a batch, as many from each scale as the square root
        of its cells asks for (random restarts, arXiv 2005.00341).

        Args:
            latents: (batch, channels, h, w) of training pictures.
            min_share: a code is dead if it is drawn less than this share of what equal use of all codes would give.

        Returns:
            Indices (n,) of the replaced codes; the optimizer's moments for these rows of `embedding` are stale.
        """
        drawn = self.code_usage.float().sum(dim=1)
        floor = min_share * drawn.sum() / self.config.codebook_size
        dead = (self.code_usage.sum(dim=0) <= floor).nonzero().flatten()
        if len(dead) == 0:
            return dead
        grids = self.config.grid_sizes
        shares = torch.tensor([height * width for height, width in grids]).sqrt()
        wanted = (shares / shares.sum() * len(dead)).ceil().long().tolist()
        explained = [0.0, *self.quantize(latents)[1][:-1]]
        pool = []
        for step, (size, count) in enumerate(zip(grids, wanted, strict=True)):
            vectors = self._vectors(latents.float() - explained[step], size, step == len(grids) - 1)
            pool.append(vectors[torch.randperm(len(vectors))[:count].to(vectors.device)])
        pool = torch.cat(pool)
        pool = pool[torch.randperm(len(pool))[: len(dead)].to(pool.device)]
        dead = dead[: len(pool)]
        self.embedding.weight[dead] = pool.to(self.embedding.weight.dtype)
        # Twice the floor: a new code has some time to be drawn before it counts as dead again.
        self.code_usage[:, dead] = (2 * floor * drawn / drawn.sum().clamp(min=1e-9))[:, None]
        return dead

    def usage_percent(self, batch_cells: int) -> list[float]:
        """
        Per scale, the share in percent of codes that are drawn at least 0.08 times as often as if all were equally
        likely, when a batch has `batch_cells` cells in its last grid (batch * h * w).
        """
        margin = batch_cells / self.config.codebook_size * 0.08
        return [100 * (usage >= margin).float().mean().item() for usage in self.code_usage]
