"""Rotary position embeddings at any positions, plain and as xPos."""

from __future__ import annotations

import torch
from torch import Tensor, nn

XPOS_RANGE = 100.0  # powers of two that xPos may scale by: fp32 and bf16 hold 126


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., D) rotated: pairs are the halves of D, cos and sin (..., D) as in Llama."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embedding.

    Args:
        head_dim: D, even.
        base: Ratio of the largest to the smallest wave length, over 2 pi.
        xpos_base: Scale base of xPos in tokens (512 in its paper); None is plain rotary embedding.

    Source: Su et al. 2021 (arXiv 2104.09864), section 3.2; Sun et al. 2022 (arXiv 2212.10554),
    algorithm 1.

    >>> rotary, x = Rotary(8), torch.randn(1, 5, 2, 8)
    >>> moved = rotary(x, torch.arange(5)[:, None])
    >>> torch.allclose(moved[:, 0], x[:, 0]) and torch.allclose(moved.norm(), x.norm())
    True
    """

    def __init__(
        self, head_dim: int, base: float = 10000.0, xpos_base: float | None = None
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"Rotary: head_dim is {head_dim}; expected an even number")
        self.head_dim, self.base, self.xpos_base = head_dim, base, xpos_base

    def forward(self, x: Tensor, positions: Tensor, key: bool = False) -> Tensor:
        """x (..., D) at positions (int64, broadcasting to x's shape without D).

        key: With xPos, keys shrink as queries grow.

        Raises:
            ValueError: Positions so far from 0 that xPos would overflow.
        """
        D = self.head_dim
        even = torch.arange(0, D, 2, device=x.device, dtype=torch.float64)
        angle = positions.unsqueeze(-1) * self.base ** (-even / D)
        angle = torch.cat([angle, angle], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        if self.xpos_base is not None:
            zeta = (even + 0.4 * D) / (1.4 * D)
            power = positions.unsqueeze(-1) * torch.cat([zeta, zeta]).log2() / self.xpos_base
            self._check_range(power)
            factor = torch.exp2(-power if key else power)
            cos, sin = cos * factor, sin * factor
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rotate(x.to(dtype), cos.to(dtype), sin.to(dtype)).to(x.dtype)

    def _check_range(self, power: Tensor) -> None:
        if torch.compiler.is_compiling() or power.numel() == 0:
            return
        largest = power.abs().max().item()
        if largest > XPOS_RANGE:
            raise ValueError(
                f"Rotary: xPos with xpos_base = {self.xpos_base} scales by 2**{largest:.0f} at "
                f"these positions; expected at most 2**{XPOS_RANGE:.0f}; nearest is xpos_base = "
                f"{self.xpos_base * largest / XPOS_RANGE:.0f}"  # type: ignore[operator]
            )
