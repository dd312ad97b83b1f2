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
        factors: (rows or 1, 1, n, pairs) complex64, the same as complex numbers, on a CPU: fewer operations. `None` elsewhere.
    """

    kept: torch.Tensor
    turned: torch.Tensor
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
        is_complex = interleaved and cos.is_cpu and not torch.compiler.is_compiling()
        factors = torch.complex(cos, sin) if is_complex else None
        return cls(cos.unsqueeze(dim), torch.stack([-sin, sin], dim=dim), interleaved, factors)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (rows or 1, n, pairs), views."""
        dim = -1 if self.interleaved else -2
        return self.kept.select(dim, 0)[:, 0], self.turned.select(dim, 1)[:, 0]

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Turns (..., rows, heads, n, head_dim), in float32."""
        if self.factors is not None and not torch.is_grad_enabled():
            # The same numbers as below, seen as complex ones at once, which has no gradients.
            turned = states.float().view(torch.complex64) * self.factors
            return turned.view(torch.float32).to(states.dtype)
        shape = (-1, 2) if self.interleaved else (2, -1)
        pairs = states.float().view(*states.shape[:-1], *shape)
        if self.factors is not None:
            turned = torch.view_as_real(torch.view_as_complex(pairs) * self.factors)
            return turned.flatten(-2).to(states.dtype)
        # (first, second) * cos + (second, first) * (-sin, sin)
        swapped = pairs.flip(-1 if self.interleaved else -2)
        return torch.addcmul(pairs * self.kept, swapped, self.turned).flatten(-2).to(states.dtype)
