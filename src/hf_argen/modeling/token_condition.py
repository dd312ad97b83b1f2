"""The tokens of a caption as condition, for models that attend to them (Fluid, arXiv 2410.13863)."""

from collections.abc import Iterable

import torch
from torch import nn

from .layers.precision import suited
from .vector_condition import VectorConditionModules


def additive_mask(seen: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Mask (batch, 1, 1, keys) under which no one sees keys where `seen` (batch, keys) is false; `None` without."""
    if seen is None:
        return None
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]


class TokenConditionModules(VectorConditionModules):
    """
    For the transformer of a family: projected caption tokens, through layers of their own.

    The class has what [`VectorConditionModules`] asks for.
    """

    def add_token_modules(self, layers: Iterable[nn.Module], hidden_size: int, eps: float) -> None:
        """
        Beside `add_condition_modules`: layers that bring caption tokens closer to pictures.

        Args:
            layers: modules that take tokens (batch, n, hidden_size) and an additive mask.
            eps: of the norm after them.
        """
        self.text_layers = nn.ModuleList(layers)
        self.text_norm = nn.LayerNorm(hidden_size, eps) if len(self.text_layers) else nn.Identity()

    def text_tokens(
        self,
        prompt_embeds: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            prompt_embeds: (batch, tokens, text_embed_dim), or pooled (batch, text_embed_dim), one token then.
            prompt_ids, prompt_attention_mask: (batch, tokens).
            drop: (batch,) bool, rows that read the null text, one token, instead.

        Returns:
            tokens (batch, n, hidden_size) and where they are none of padding, (batch, n) bool.
        """
        prompt_embeds = self.encoded_text(prompt_embeds, prompt_ids, prompt_attention_mask)
        if prompt_embeds.ndim == 2:
            prompt_embeds, prompt_attention_mask = prompt_embeds.unsqueeze(1), None
        seen = torch.ones(prompt_embeds.shape[:2], dtype=torch.bool, device=prompt_embeds.device)
        if prompt_attention_mask is not None:
            seen = prompt_attention_mask.bool()
        if drop is not None:
            null = self.null_text_embedding(drop.new_zeros(drop.shape, dtype=torch.long)).unsqueeze(1)
            prompt_embeds = torch.where(drop[:, None, None], null, prompt_embeds.to(null.dtype))
            first = torch.arange(seen.shape[1], device=seen.device) == 0
            seen = torch.where(drop[:, None], first, seen)
        dtype = self.dtype_of_computation
        tokens = self.text_projection(suited(prompt_embeds.to(dtype), self.text_projection)).to(dtype)
        mask = additive_mask(seen, dtype)
        for layer in self.text_layers:
            tokens = layer(tokens, mask)
        return self.text_norm(tokens), seen

    def null_text_tokens(
        self, batch_size: int, length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `text_tokens`, of the null text, padded to `length`; `device` is that of inputs."""
        drop = torch.ones(batch_size, dtype=torch.bool, device=device)
        return self.text_tokens(
            torch.zeros(batch_size, length, self.config.text_embed_dim, device=device), drop=drop
        )
