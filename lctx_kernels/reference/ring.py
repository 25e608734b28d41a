"""Definition of Ring attention: key/value shards of one sequence travel round the ranks."""

import torch

from .merge import merge_attention


def ring_attention(qs, ks, vs, positions, *, causal=True, scale=None, window=None):
    """Softmax attention over a sequence split over ranks: a loop over simulated ranks and steps.

    qs, ks, vs: per rank (B, L, Hq, Dk), (B, L, Hkv, Dk), (B, L, Hkv, Dv), L may differ and be 0.
    positions: per rank (L,) int64, the true positions of its tokens in any order; visibility
    depends on them alone. window: position i sees position j only if |i - j| < window.
    Returns the lists of out (B, L, Hq, Dv) and lse (B, Hq, L), one entry per rank.
    Source: Liu et al. 2023 (arXiv 2310.01889), algorithm 1.

    >>> q, k, v = torch.randn(3, 1, 8, 2, 4)
    >>> zigzag = [torch.tensor([0, 1, 6, 7]), torch.tensor([2, 3, 4, 5])]
    >>> outs, lses = ring_attention(*([x[:, i] for i in zigzag] for x in (q, k, v)), zigzag)
    >>> torch.allclose(outs[0][:, 0], v[:, 0])  # position 0 sees itself alone
    True
    """
    world_size = len(qs)
    outs, lses = [], []
    for rank, (q, i) in enumerate(zip(qs, positions, strict=True)):
        (B, L, Hq, Dk), Dv = q.shape, vs[rank].shape[-1]
        stat = torch.promote_types(q.dtype, torch.float32)
        tau = Dk**-0.5 if scale is None else scale
        out = q.new_zeros(B, L, Hq, Dv, dtype=stat)
        lse = q.new_full((B, Hq, L), -torch.inf, dtype=stat)
        for step in range(world_size):
            source = (rank - step) % world_size  # whose shard arrives after `step` hops
            k, v = ks[source].to(stat), vs[source].to(stat)
            k, v = (x.repeat_interleave(Hq // x.shape[2], dim=2) for x in (k, v))
            offset = i[:, None] - positions[source]
            visible = (offset >= 0) if causal else torch.ones_like(offset, dtype=torch.bool)
            if window is not None:
                visible = visible & (offset.abs() < window)
            scores = tau * torch.einsum("bihd,bjhd->bhij", q.to(stat), k)
            scores = scores.masked_fill(~visible, -torch.inf)
            empty = ~visible.any(-1, keepdim=True)
            step_lse = scores.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
            step_out = torch.einsum("bhij,bjhd->bihd", (scores - step_lse).exp(), v)
            step_lse = step_lse.masked_fill(empty, -torch.inf).squeeze(-1)
            out, lse = merge_attention(out, lse, step_out, step_lse)
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return outs, lses
