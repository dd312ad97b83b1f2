"""The angles of rotary position embeddings (arXiv 2104.09864), in the form in which they are applied."""

from typing import NamedTuple

import torch


class Rotation(NamedTuple):
    """
    How the pairs of channels of a head turn at every token. Whatever gives the angles (positions in a sequence, rows and
    columns of a grid, sections of channels with positions of their own), it is a table of cosines and sines.

    Attributes:
        kept: (rows or 1, 1, n, pairs, 1), or (rows or 1, 1, n, 1, pairs) for halves: factors on a pair.
        turned: the same with 2 in place of the 1: factors on the pair with its channels swapped.
        interleaved: a pair are adjacent channels (LlamaGen); otherwise one of each half of the channels (Llama).
        factors: (rows or 1, 1, n, pairs) complex64, the same as complex numbers, in place of both for interleaved pairs on a
            CPU: fewer operations.
    """

    kept: torch.Tensor | None
    turned: torch.Tensor | None
    interleaved: bool = True
    factors: torch.Tensor | None = None

    @classmethod
    def of(cls, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = True) -> "Rotation":
        """
        Args:
            cos, sin: (rows or 1, n, pairs) float32.
        """
        dim = -1 if interleaved else -2
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        if interleaved and cos.is_cpu and not torch.compiler.is_compiling():
            return cls(None, None, interleaved, torch.complex(cos, sin))
        return cls(cos.unsqueeze(dim), torch.stack([-sin, sin], dim=dim), interleaved)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (rows or 1, n, pairs), views."""
        if self.factors is not None:
            return self.factors.real[:, 0], self.factors.imag[:, 0]
        dim = -1 if self.interleaved else -2
        return self.kept.select(dim, 0)[:, 0], self.turned.select(dim, 1)[:, 0]

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Turns (..., rows, heads, n, head_dim), in float32."""
        if self.factors is not None:
            if torch.is_grad_enabled():
                pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
                turned = torch.view_as_real(pairs * self.factors).flatten(-2)
            else:  # the same numbers, seen as complex ones at once, which has no gradients
                turned = (states.float().view(torch.complex64) * self.factors).view(torch.float32)
            return turned.to(states.dtype)
        shape = (-1, 2) if self.interleaved else (2, -1)
        pairs = states.float().view(*states.shape[:-1], *shape)
        # (first, second) * cos + (second, first) * (-sin, sin)
        swapped = pairs.flip(-1 if self.interleaved else -2)
        return torch.addcmul(pairs * self.kept, swapped, self.turned).flatten(-2).to(states.dtype)
