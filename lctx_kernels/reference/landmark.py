"""Definition of Landmark attention: an earlier block weighs what its landmark token weighs."""

import torch


def landmark_attention(q, k, v, *, block_size=None, is_landmark=None, scale=None):
    """Causal grouped softmax.

    q: (B, Tq, Hq, Dk), k: (B, Tk, Hkv, Dk), v: (B, Tk, Hkv, Dv); query head h reads key/value head
    h // (Hq // Hkv); the queries are the last Tq of the Tk positions. block_size: positions
    block_size - 1, 2 * block_size - 1, ... are landmarks; or is_landmark: (B, Tk) bool.
    A position's block is the number of landmarks before it. A row has one softmax over the ordinary
    keys of its own block and the landmarks of earlier blocks; each landmark's weight is shared out
    by a softmax over the ordinary keys of its block (none: that landmark is excluded).
    Returns out (B, Tq, Hq, Dv) and lse (B, Hq, Tq) of the first softmax; empty rows: 0 and -inf.
    Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.1.

    >>> q, k, v = torch.randn(3, 1, 9, 2, 8)
    >>> out, lse = landmark_attention(q, k, v, block_size=4)
    >>> torch.allclose(out[:, 3], out[:, 2])  # a landmark is a query like any other
    False
    """
    Tq, Tk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    stat = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.to(stat).repeat_interleave(group, dim=2) for x in (k, v))

    j = torch.arange(Tk, device=q.device)
    i = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    if is_landmark is None:
        is_landmark = ((j + 1) % block_size == 0).expand(q.shape[0], Tk)
    block = is_landmark.cumsum(1) - is_landmark.long()  # (B, Tk)
    own_block = (is_landmark[:, None] & (j < i)).sum(-1, keepdim=True)  # (B, Tq, 1)
    count = torch.zeros_like(block).scatter_add(1, block, (~is_landmark).long()).gather(1, block)
    landmark, block, nonempty = is_landmark[:, None], block[:, None], (count > 0)[:, None]
    own = (~landmark & (block == own_block) & (j <= i))[:, None]  # (B, 1, Tq, Tk)
    gates = (landmark & (block < own_block) & nonempty)[:, None]
    past = (~landmark & (block < own_block))[:, None]

    scores = scale * torch.einsum("bihd,bjhd->bhij", q.to(stat), k)
    main = scores.masked_fill(~(own | gates), -torch.inf)
    empty = ~(own | gates).any(-1, keepdim=True)
    lse = main.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
    weights = (main - lse).exp()  # 0 on empty rows

    slot, zeros = block[:, None].expand_as(scores), torch.zeros_like(scores)  # one slot per block
    inner = scores.masked_fill(~past, -torch.inf)
    top = zeros.scatter_reduce(-1, slot, inner.detach(), "amax", include_self=False)
    inner = (scores - top.gather(-1, slot)).masked_fill(~past, -torch.inf).exp()
    inner = inner / zeros.scatter_add(-1, slot, inner).gather(-1, slot).masked_fill(~past, 1)
    share = zeros.scatter_add(-1, slot, weights.masked_fill(~gates, 0)).gather(-1, slot)
    out = torch.einsum("bhij,bjhd->bihd", weights.masked_fill(gates, 0) + share * inner, v)
    return out.to(q.dtype), lse.masked_fill(empty, -torch.inf).squeeze(-1)
