"""Definition of merging: the exact union of two partial attention results."""

import torch


def merge_attention(out_a, lse_a, out_b, lse_b):
    """Merge attention over the keys a with attention over the keys b into attention over both.

    out_a, out_b: (B, T, H, D). lse_a, lse_b: (B, H, T), natural logarithm, -inf where a row saw no
    key. Returns (out, lse) of the same shapes. A key present in both sets counts twice.
    Source: Milakov & Gimelshein 2018 (arXiv 1805.02867), section 3.1.

    >>> out, lse = torch.randn(1, 5, 2, 8), torch.zeros(1, 2, 5)
    >>> merged, merged_lse = merge_attention(out, lse, out, lse)
    >>> torch.allclose(merged, out) and torch.allclose(merged_lse, torch.tensor(2.0).log())
    True
    """
    empty = (lse_a == -torch.inf) & (lse_b == -torch.inf)
    lse = torch.logaddexp(lse_a.masked_fill(empty, 0), lse_b.masked_fill(empty, 0))
    weight_a, weight_b = (  # (B, T, H, 1), 0 where a side is empty
        (side - lse).exp().transpose(1, 2).unsqueeze(-1) for side in (lse_a, lse_b)
    )
    out = weight_a * out_a.to(lse.dtype) + weight_b * out_b.to(lse.dtype)
    return out.to(out_a.dtype), lse.masked_fill(empty, -torch.inf)
