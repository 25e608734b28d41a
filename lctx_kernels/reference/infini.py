"""Definition of Infini-attention: local softmax and a compressive memory of earlier segments."""

import torch


def infini_attention(q, k, v, mem=None, *, gate=None, q_mem=None, k_mem=None, segment_len=2048,
                     update="linear", first="gate", detach_every=0, scale=None):  # fmt: skip
    """Causal softmax inside each segment, gated with what the memory of earlier segments retrieves.

    q: (B, T, Hq, Dk), k: (B, T, Hkv, Dk), v: (B, T, Hkv, Dv); head h reads kv h // (Hq // Hkv).
    mem: (M (B, Hkv, Dk, Dv), z (B, Hkv, Dk)), None: empty. gate: (Hq,) logits, None: zeros.
    q_mem, k_mem: q, k for the memory (un-rotated), None: q, k. update: "linear" or "delta".
    first: segment 0 without mem is (1 - g) A_dot ("gate") or A_dot ("bypass").
    detach_every: n > 0 cuts the gradient through the memory after every n-th segment of the call.
    Returns out (B, T, Hq, Dv) and the memory (M, z) after the last (perhaps shorter) segment.
    Source: Munkhdalai et al. 2024 (arXiv 2404.07143), section 2.1.

    >>> out, (M, z) = infini_attention(*torch.randn(3, 1, 12, 2, 8), segment_len=4)
    >>> M.shape, z.shape
    (torch.Size([1, 2, 8, 8]), torch.Size([1, 2, 8]))
    """
    (B, T, Hq, Dk), (Hkv, Dv) = q.shape, v.shape[2:]
    group, dtype, stat = Hq // Hkv, q.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = Dk**-0.5 if scale is None else scale
    gate = q.new_zeros(Hq, dtype=stat) if gate is None else gate
    g = torch.sigmoid(gate.to(stat))[:, None]  # (Hq, 1)
    q_mem, k_mem = (q if q_mem is None else q_mem), (k if k_mem is None else k_mem)
    q, k, v, q_mem, k_mem = (x.to(stat) for x in (q, k, v, q_mem, k_mem))
    p, r = (x.clamp(max=0).exp() + x.relu() for x in (q_mem, k_mem))  # elu(x) + 1
    M, z = (k.new_zeros(B, Hkv, Dk, Dv), k.new_zeros(B, Hkv, Dk)) if mem is None else mem

    def retrieve(phi, M, z):  # (B, N, H, Dk), (B, H, Dk, Dv), (B, H, Dk) -> (B, N, H, Dv)
        norm = torch.einsum("bnhd,bhd->bnh", phi, z).clamp(min=1e-6)
        return torch.einsum("bnhd,bhde->bnhe", phi, M) / norm.unsqueeze(-1)

    out = [v.new_zeros(B, 0, Hq, Dv)]
    for s, start in enumerate(range(0, T, segment_len)):
        t = torch.arange(start, min(start + segment_len, T), device=q.device)
        K, V = (x[:, t].repeat_interleave(group, dim=2) for x in (k, v))
        scores = scale * torch.einsum("bihd,bjhd->bhij", q[:, t], K)
        weights = scores.masked_fill(t[:, None] < t, -torch.inf).softmax(-1)
        A_dot = torch.einsum("bhij,bjhd->bihd", weights, V)
        A_mem = retrieve(p[:, t], *(x.repeat_interleave(group, dim=1) for x in (M, z)))
        bypass = s == 0 and mem is None and first == "bypass"
        out.append(A_dot if bypass else g * A_mem + (1 - g) * A_dot)
        written = v[:, t] - retrieve(r[:, t], M, z) if update == "delta" else v[:, t]
        M, z = M + torch.einsum("bnhd,bnhe->bhde", r[:, t], written), z + r[:, t].sum(1)
        if detach_every and (s + 1) % detach_every == 0:
            M, z = M.detach(), z.detach()
    return torch.cat(out, dim=1).to(dtype), (M, z)
