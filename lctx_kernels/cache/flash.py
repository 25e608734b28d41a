"""Dense attention token by token: all keys and values are kept."""

from __future__ import annotations

from torch import Tensor

from ..flash import flash_attention
from .buffer import Buffer


class FlashState:
    """Keys and values of everything read.

    Args:
        window: As in `flash_attention`.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1.
    Equivalent to: one call of lctx_kernels.flash_attention on all tokens.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 11, 2, 8)
    >>> state = FlashState()
    >>> parts = [state.attend(*(x[:, i : i + 3] for x in (q, k, v))) for i in range(0, 11, 3)]
    >>> torch.allclose(torch.cat(parts, dim=1), flash_attention(q, k, v), atol=1e-5)
    True
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.k, self.v = Buffer(), Buffer()
        self.seen = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Output (B, T, Hq, Dv) of the next T tokens."""
        self.k.append(k)
        self.v.append(v)
        self.seen += q.shape[1]
        return flash_attention(q, self.k.value, self.v.value, window=self.window, scale=scale)

    def select(self, rows: Tensor) -> FlashState:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        chosen = FlashState(self.window)
        chosen.k, chosen.v, chosen.seen = self.k.select(rows), self.v.select(rows), self.seen
        return chosen
