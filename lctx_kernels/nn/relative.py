"""T5's relative-position bias, and dilated attention with it in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._dtypes import stat_dtype, without_autocast


class RelativeBias(nn.Module):
    """A learned number per head and bucket of distances: exact when near, logarithmic when far.

    Args:
        num_heads: Heads.
        causal: All buckets are for keys before the query; else half of them for each side.
        num_buckets: Buckets.
        max_distance: Distances from here on share the last bucket (tokens).

    Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1.

    >>> bias = RelativeBias(4, causal=True)
    >>> bias(torch.arange(6)).shape
    torch.Size([6, 4])
    """

    def __init__(
        self, num_heads: int, causal: bool, num_buckets: int = 32, max_distance: int = 128
    ) -> None:
        super().__init__()
        self.causal, self.num_buckets, self.max_distance = causal, num_buckets, max_distance
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, distance: Tensor) -> Tensor:
        """(..., H) bias for distances (...) int64, position of the query minus that of the key."""
        buckets = self.num_buckets
        side = torch.zeros_like(distance)
        if not self.causal:
            buckets //= 2
            side = (distance < 0) * buckets
            distance = distance.abs()
        distance = distance.clamp(min=0)
        exact = buckets // 2
        ratio = (distance.clamp(min=exact) / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return self.weight[side + torch.where(distance < exact, distance, far)]


def dilated_attention_with_bias(
    q: Tensor, k: Tensor, v: Tensor, segment_lengths: Sequence[int], dilation_rates: Sequence[int],
    bias: RelativeBias, *, causal: bool, head_offset: str, seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """`dilated_attention` with a bias on the scores, in plain PyTorch.

    Args:
        q: (B, T, Hq, Dk), k: (B, T, Hkv, Dk), v: (B, T, Hkv, Dv), and the other arguments as in
            `dilated_attention`.
        bias: Distances to biases per head.

    Returns:
        out (B, T, Hq, Dv). Memory: (w / r) ** 2 scores per head, row and segment.
    """
    (B, T, Hq, D), dtype, group = q.shape, q.dtype, q.shape[2] // k.shape[2]
    stat = stat_dtype(dtype)
    q, k, v = (x.to(stat) for x in (q, k, v))
    head = torch.arange(Hq)
    outs, lses = [], []
    with without_autocast(q.device.type):
        for w, r in zip(segment_lengths, dilation_rates, strict=True):
            offsets = head % r if head_offset == "mod" else head // -(-Hq // r)
            out, lse = v.new_zeros(B, T, Hq, v.shape[-1]), v.new_full((B, T, Hq), -torch.inf)
            for start in range(0, T, w):
                for offset in offsets.unique().tolist():
                    heads = (offsets == offset).nonzero().flatten().to(q.device)
                    i = torch.arange(start + offset, min(start + w, T), r, device=q.device)
                    if not len(i):
                        continue
                    keys, values = (x[:, i[:, None], heads // group] for x in (k, v))
                    scores = D**-0.5 * torch.einsum("bihd,bjhd->bijh", q[:, i[:, None], heads],
                                                    keys)  # fmt: skip
                    scores = scores + bias(i[:, None] - i).to(stat)[..., heads]
                    visible = _visible(i, causal, seqlens)
                    part, part_lse = _softmax(scores.masked_fill(~visible, -torch.inf), values)
                    out = out.index_put((slice_index(B, q), i[:, None], heads), part)
                    lse = lse.index_put((slice_index(B, q), i[:, None], heads), part_lse)
            outs.append(out)
            lses.append(lse)
        stacked = torch.stack(lses)
        empty = (stacked == -torch.inf).all(0)
        total = stacked.masked_fill(empty, 0).logsumexp(0)
        weights = (stacked - total).exp().unsqueeze(-1)
        return (weights * torch.stack(outs)).sum(0).to(dtype)


def slice_index(B: int, like: Tensor) -> Tensor:
    """Indices of all rows, shaped to broadcast against (tokens, heads)."""
    return torch.arange(B, device=like.device)[:, None, None]


def _visible(i: Tensor, causal: bool, seqlens: Tensor | None) -> Tensor:
    """(B or 1, n, n, 1) which of the selected positions see which."""
    visible = (i <= i[:, None])[None] if causal else torch.ones_like(i <= i[:, None])[None]
    if seqlens is not None:
        real = i < seqlens[:, None]
        visible = visible & real[:, :, None] & real[:, None]
    return visible.unsqueeze(-1)


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Out (B, n, H, D) and lse (B, n, H) of scores (B, n, n, H); empty rows give 0 and -inf."""
    empty = (scores == -torch.inf).all(2, keepdim=True)
    lse = scores.masked_fill(empty, 0).logsumexp(2, keepdim=True)
    out = torch.einsum("bijh,bjhd->bihd", (scores - lse).exp(), values)
    return out, lse.masked_fill(empty, -torch.inf).squeeze(2)
