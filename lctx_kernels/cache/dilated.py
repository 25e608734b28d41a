"""Dilated attention token by token: all keys are kept, each query reads those it selects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dtypes import stat_dtype
from ..dilated import dilated_attention
from ..flash import flash_attention
from ..merge import merge_attention
from .buffer import Buffer


class DilatedState:
    """Keys and values of everything read; a new token reads sum(w / r) of them at most.

    Args:
        segment_lengths, dilation_rates, head_offset: As in `dilated_attention`.

    Source: Ding et al. 2023 (arXiv 2307.02486), section 2.3.
    Equivalent to: one call of lctx_kernels.dilated_attention on all tokens. A segment longer than
    the text so far is never clipped here: the clipped one selects the same keys.

    >>> from lctx_kernels import dilated_attention
    >>> q, k, v = torch.randn(3, 1, 11, 4, 8)
    >>> state = DilatedState([4, 8], [1, 2])
    >>> parts = [state.attend(*(x[:, i : i + 3] for x in (q, k, v))) for i in range(0, 11, 3)]
    >>> out = dilated_attention(q, k, v, [4, 8], [1, 2])
    >>> torch.allclose(torch.cat(parts, dim=1), out, atol=1e-5)
    True
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        head_offset: str = "mod",
    ) -> None:
        self.branches = list(zip(segment_lengths, dilation_rates, strict=True))
        self.head_offset = head_offset
        self.k, self.v = Buffer(), Buffer()
        self.seen = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Output (B, T, Hq, Dv) of the next T tokens."""
        self.k.append(k)
        self.v.append(v)
        start, self.seen = self.seen, self.seen + q.shape[1]
        if start == 0:
            lengths, rates = zip(*self.branches, strict=True)
            return dilated_attention(
                q, k, v, lengths, rates, scale=scale, head_offset=self.head_offset
            )
        out, lse = self._branch(q, start, *self.branches[0], scale)
        for w, r in self.branches[1:]:
            out, lse = merge_attention(out, lse, *self._branch(q, start, w, r, scale))
        return out

    def select(self, rows: Tensor) -> DilatedState:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        lengths, rates = zip(*self.branches, strict=True)
        chosen = DilatedState(lengths, rates, self.head_offset)
        chosen.k, chosen.v, chosen.seen = self.k.select(rows), self.v.select(rows), self.seen
        return chosen

    def _branch(
        self, q: Tensor, start: int, w: int, r: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Out and lse of branch (w, r); 0 and -inf where it does not select the query."""
        B, _, Hq, _ = q.shape
        keys, values = self.k.value, self.v.value
        head = torch.arange(Hq)
        offsets = head % r if self.head_offset == "mod" else head // -(-Hq // r)
        group = Hq // keys.shape[2]
        out = q.new_zeros(*q.shape[:3], values.shape[-1])
        lse = None
        for segment in range(start // w, (self.seen - 1) // w + 1):
            end = min((segment + 1) * w, self.seen)
            for offset in offsets.unique().tolist():
                heads = (offsets == offset).nonzero().flatten().to(q.device)
                first = segment * w + offset  # of the selected keys
                query = first + -(-max(start - first, 0) // r) * r  # first selected query
                if query >= end:
                    continue
                rows = slice(query - start, end - start, r)
                k, v = (x[:, first:end:r].index_select(2, heads // group) for x in (keys, values))
                part = flash_attention(
                    q[:, rows].index_select(2, heads), k, v, scale=scale, return_lse=True
                )
                if lse is None:
                    lse = part[1].new_full((B, Hq, q.shape[1]), -torch.inf)
                out[:, rows, heads] = part[0].to(out.dtype)
                lse[:, heads, rows] = part[1]
        if lse is None:
            lse = q.new_full((B, Hq, q.shape[1]), -torch.inf, dtype=stat_dtype(q.dtype))
        return out, lse
