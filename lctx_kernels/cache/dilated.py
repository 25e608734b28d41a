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
        self.seen += q.shape[1]
        lengths, rates = zip(*self.branches, strict=True)
        return dilated_attention_last(
            q, self.k.value, self.v.value, lengths, rates, scale=scale,
            head_offset=self.head_offset,
        )  # fmt: skip

    def select(self, rows: Tensor) -> DilatedState:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        lengths, rates = zip(*self.branches, strict=True)
        chosen = DilatedState(lengths, rates, self.head_offset)
        chosen.k, chosen.v, chosen.seen = self.k.select(rows), self.v.select(rows), self.seen
        return chosen


def dilated_attention_last(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    scale: float | None = None,
    head_offset: str = "mod",
) -> Tensor:
    """Causal `dilated_attention` of the last Tq of Tk tokens.

    Args:
        q: (B, Tq, Hq, Dk), k: (B, Tk, Hkv, Dk), v: (B, Tk, Hkv, Dv), Tq <= Tk; the others as in
            `dilated_attention`.

    Returns:
        (B, Tq, Hq, Dv).

    >>> q, k, v = torch.randn(3, 1, 12, 4, 8)
    >>> last = dilated_attention_last(q[:, 10:], k, v, [4, 8], [1, 2])
    >>> torch.allclose(last, dilated_attention(q, k, v, [4, 8], [1, 2])[:, 10:], atol=1e-5)
    True
    """
    if q.shape[1] == k.shape[1]:
        return dilated_attention(
            q, k, v, segment_lengths, dilation_rates, scale=scale, head_offset=head_offset
        )
    branches = list(zip(segment_lengths, dilation_rates, strict=True))
    out, lse = _branch(q, k, v, *branches[0], head_offset, scale)
    for w, r in branches[1:]:
        out, lse = merge_attention(out, lse, *_branch(q, k, v, w, r, head_offset, scale))
    return out


def _branch(
    q: Tensor, k: Tensor, v: Tensor, w: int, r: int, head_offset: str, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Out and lse of branch (w, r) for the last tokens; 0 and -inf where it does not select one."""
    B, Tq, Hq, _ = q.shape
    Tk, group = k.shape[1], Hq // k.shape[2]
    before = Tk - Tq
    head = torch.arange(Hq)
    offsets = head % r if head_offset == "mod" else head // -(-Hq // r)
    out = q.new_zeros(B, Tq, Hq, v.shape[-1])
    lse = q.new_full((B, Hq, Tq), -torch.inf, dtype=stat_dtype(q.dtype))
    for segment in range(before // w, (Tk - 1) // w + 1):
        end = min((segment + 1) * w, Tk)
        for offset in offsets.unique().tolist():
            heads = (offsets == offset).nonzero().flatten().to(q.device)
            first = segment * w + offset  # of the selected keys
            query = first + -(-max(before - first, 0) // r) * r  # first selected query
            if query >= end:
                continue
            rows = slice(query - before, end - before, r)
            keys, values = (x[:, first:end:r].index_select(2, heads // group) for x in (k, v))
            part, part_lse = flash_attention(
                q[:, rows].index_select(2, heads), keys, values, scale=scale, return_lse=True
            )
            out[:, rows, heads] = part.to(out.dtype)
            lse[:, heads, rows] = part_lse
    return out, lse
