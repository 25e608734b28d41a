"""Definition of Landmark decoding: new tokens over the best blocks that a cache holds."""

import torch


def landmark_decode(q, k, v, blocks_k, blocks_v, open_k, open_v, *, open_len, top_k, always=0,
                    select="token_and_head", rope=None, scale=None):  # fmt: skip
    """New tokens over the best `top_k` blocks of a store, its last `always`, and the open block.

    q: (B, T, Hq, D), k: (B, T, Hkv, D), v: (B, T, Hkv, Dv) of the new tokens, not rotated.
    blocks_k, blocks_v: (B, count, Hkv, L, D); open_k, open_v: (B, Hkv, L, D), open_len tokens.
    Stored keys are rotated to their places 0 to L - 1 in the block; the last one is its landmark.
    Queries stand where this puts them: blocks before the last top_k share the first place, the
    chosen ones follow in order, the `always` ones, the open one. rope: (2, places, D) cos and sin.
    select: whose choice the largest scores of landmarks are: "token_and_head", "head", "token".
    Returns out, lse as landmark_attention on these blocks, and their numbers (B, T|1, Hq|1, used).
    Source: Mohtashami & Jaggi 2023 (arXiv 2305.16300), section 3.2."""
    (B, T, Hq, D), (Hkv, L), count = q.shape, open_k.shape[1:3], blocks_k.shape[1] - always
    stat, used, dev = torch.promote_types(q.dtype, torch.float32), min(top_k, count), q.device
    moved, scale = int(count > used), D**-0.5 if scale is None else scale
    own_k, own_v, past_k, past_v = (x.to(stat).repeat_interleave(Hq // Hkv, dim=d) for x, d in (
        (open_k, 1), (open_v, 1), (blocks_k, 2), (blocks_v, 2)))  # fmt: skip

    def rotate(x, place):  # (..., D) and int64 that broadcasts to (...)
        x, half = x.to(stat), x.shape[-1] // 2
        if rope is None:
            return x
        cos, sin = rope.to(stat)[:, place]
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    inside = open_len + torch.arange(T, device=dev)[:, None]  # (T, 1), place in the open block
    place = inside + (used + moved + always) * L
    n = torch.arange(count, device=dev)
    start = L * (n - (count - used) + moved).clamp(min=0)  # where a block would be placed
    turned = rotate(q[:, :, :, None].expand(-1, -1, -1, count, -1), (place - start)[:, None])
    scores = scale * torch.einsum("bthnd,bnhd->bthn", turned, past_k[:, :count, :, -1])
    if select != "token_and_head":
        scores = scores.log_softmax(-1).amax(1 if select == "head" else 2, keepdim=True)
    blocks = scores.argsort(dim=-1, stable=True)[..., count - used :].sort(-1).values

    m = torch.arange(used + always, device=dev)
    chosen = torch.cat([blocks.expand(B, T, Hq, -1), (count + m[:always]).expand(B, T, Hq, -1)], -1)
    start = L * (m + moved * (chosen >= count - used))
    row, head = torch.arange(B, device=dev).view(B, 1, 1, 1), torch.arange(Hq, device=dev)[:, None]
    keys, values = (x[row, chosen, head] for x in (past_k, past_v))  # (B, T, Hq, m, L, D)
    turned = rotate(q[:, :, :, None].expand(-1, -1, -1, len(m), -1), place[:, :, None] - start)
    scores = scale * torch.einsum("bthmd,bthmld->bthml", turned, keys)
    inner = torch.einsum("bthml,bthmld->bthmd", scores[..., :-1].softmax(-1), values[..., :-1, :])

    new = (x.transpose(1, 2).repeat_interleave(Hq // Hkv, 1) for x in (rotate(k, inside), v))
    old = (x[:, :, :open_len] for x in (own_k, own_v))
    keys, values = (torch.cat([a, b.to(stat)], 2) for a, b in zip(old, new, strict=True))
    j = torch.arange(open_len + T, device=dev)
    local = scale * torch.einsum("bthd,bhjd->bthj", rotate(q, inside), keys)
    local = local.masked_fill(~((j <= inside) & (j < L - 1))[:, None], -torch.inf)
    weights = torch.cat([scores[..., -1], local], -1)
    lse = weights.logsumexp(-1, keepdim=True)
    past, here = (weights - lse).exp().split([len(m), len(j)], -1)
    out = (past[..., None] * inner).sum(-2) + torch.einsum("bthj,bhjd->bthd", here, values)
    return out.to(q.dtype), lse[..., 0].transpose(1, 2), blocks.int()
