"""Definition of LongNet's dilated attention: a union of sparse attentions."""

import torch


def dilated_attention(q, k, v, segment_lengths, dilation_rates, *, causal=True, scale=None,
                      head_offset="mod", mix_grad="exact", seqlens=None):  # fmt: skip
    """Softmax attention over the multiset union of the keys that the branches (w, r) select.

    q: (B, T, Hq, Dk), k: (B, T, Hkv, Dk), v: (B, T, Hkv, Dv); head h reads kv h // (Hq // Hkv).
    Branch (w, r) of query head h selects position i iff ((i mod w) mod r) == offset; selected
    positions see the selected positions of their segment i // w. head_offset: offset is h mod r
    ("mod") or h // ceil(Hq / r) ("block"). mix_grad: "detached" holds the mixing weights constant
    in the backward. seqlens: (B,) true lengths; the pads after them are never selected.
    Returns out (B, T, Hq, Dv) and lse (B, Hq, T); where no branch selects: 0 and -inf.
    Source: Ding et al. 2023 (arXiv 2307.02486), section 2.2-2.3.

    >>> q, k, v = torch.randn(3, 1, 12, 2, 8)
    >>> out, lse = dilated_attention(q, k, v, [12], [2])  # head 0: even, head 1: odd positions
    >>> out[:, 1::2, 0].any().item(), out[:, 0::2, 1].any().item()
    (False, False)
    """
    B, T, Hq, Dk = q.shape
    group, stat = Hq // k.shape[2], torch.promote_types(q.dtype, torch.float32)
    scale = Dk**-0.5 if scale is None else scale
    k, v = (x.to(stat).repeat_interleave(group, dim=2) for x in (k, v))
    i = torch.arange(T, device=q.device)
    head = torch.arange(Hq, device=q.device)[:, None]
    real = i < (i.new_full((B,), T) if seqlens is None else seqlens)[:, None, None]  # (B, 1, T)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q.to(stat), k)

    outs, lses = [], []
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        offset = head % r if head_offset == "mod" else head // -(-Hq // r)  # (Hq, 1)
        selected = (i % w % r == offset) & real  # (B, Hq, T)
        visible = selected.unsqueeze(-1) & selected.unsqueeze(-2) & (i[:, None] // w == i // w)
        if causal:
            visible = visible & (i <= i[:, None])
        branch = scores.masked_fill(~visible, -torch.inf)
        empty = ~visible.any(-1, keepdim=True)
        lse = branch.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
        outs.append(torch.einsum("bhij,bjhd->bihd", (branch - lse).exp(), v))  # 0 on empty rows
        lses.append(lse.masked_fill(empty, -torch.inf).squeeze(-1))

    lses = torch.stack(lses)  # (branches, B, Hq, T)
    empty = (lses == -torch.inf).all(0)
    lse = lses.masked_fill(empty, 0).logsumexp(0)
    alpha = (lses - lse).exp().transpose(-1, -2).unsqueeze(-1)  # mixing weights
    alpha = alpha.detach() if mix_grad == "detached" else alpha
    out = (alpha * torch.stack(outs)).sum(0)
    return out.to(q.dtype), lse.masked_fill(empty, -torch.inf)
