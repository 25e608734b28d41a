"""Definition of exact softmax attention, the base of all other methods."""

import torch


def flash_attention(q, k, v, *, causal=True, scale=None, window=None, cu_seqlens=None):
    """Softmax attention over the visible keys.

    q: (B, Tq, Hq, Dk), k: (B, Tk, Hkv, Dk), v: (B, Tk, Hkv, Dv); query head h reads key/value head
    h // (Hq // Hkv); the queries are the last Tq of the Tk positions. scale: factor on the scores,
    Dk**-0.5 by default. window: position i sees position j only if |i - j| < window.
    cu_seqlens: (documents + 1,) int32, starts of packed documents, which do not see each other.
    Returns out (B, Tq, Hq, Dv) and lse (B, Hq, Tq), the natural logarithm of the softmax
    denominators; a row that sees no key has out 0 and lse -inf.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1.

    >>> q, k, v = torch.randn(3, 1, 6, 4, 8)
    >>> out, lse = flash_attention(q, k, v)
    >>> torch.allclose(out[:, 0], v[:, 0])  # the first row sees itself alone
    True
    """
    Tq, Tk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    stat = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.to(stat).repeat_interleave(group, dim=2) for x in (k, v))

    j = torch.arange(Tk, device=q.device)
    i = torch.arange(Tk - Tq, Tk, device=q.device)[:, None]
    visible = (j <= i) if causal else torch.ones_like(j <= i)
    if window is not None:
        visible = visible & ((i - j).abs() < window)
    if cu_seqlens is not None:
        document = torch.bucketize(j, cu_seqlens, right=True)
        visible = visible & (document[:, None] == document)

    scores = scale * torch.einsum("bihd,bjhd->bhij", q.to(stat), k)
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp()  # 0 on empty rows
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    return out.to(q.dtype), lse.masked_fill(empty, -torch.inf).squeeze(-1)
