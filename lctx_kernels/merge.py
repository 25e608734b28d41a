"""The exact union of two partial attention results."""

from __future__ import annotations

from torch import Tensor

from . import _ops
from ._checks import require


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a and of b, from attention over a and attention over b.

    Differentiable in all four. A key present in both counts twice. Autocast changes nothing.

    Args:
        out_a: (B, T, H, D) attention over the keys a; fp32, fp64, bf16 or fp16, any strides with
            stride(-1) == 1.
        lse_a: (B, H, T) natural logarithm of its denominators, fp32 (fp64 for fp64); -inf where a
            row saw no key.
        out_b: (B, T, H, D) attention over the keys b.
        lse_b: (B, H, T), as lse_a.

    Returns:
        out (B, T, H, D) in out_a's dtype and lse (B, H, T); 0 and -inf where neither saw a key.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, strides or devices that do not fit.
        NotImplementedError: Legal, but no kernel for this device.

    Source: Milakov and Gimelshein 2018 (arXiv 1805.02867), section 3.1.
    Equivalent to: lctx_kernels.reference.merge_attention.

    >>> import torch
    >>> from lctx_kernels import flash_attention, merge_attention
    >>> q, k, v = torch.randn(3, 1, 64, 4, 16)
    >>> parts = [
    ...     flash_attention(q, k[:, part], v[:, part], causal=False, return_lse=True)
    ...     for part in (slice(0, 40), slice(40, 64))
    ... ]
    >>> out, lse = merge_attention(*parts[0], *parts[1])
    >>> torch.allclose(out, flash_attention(q, k, v, causal=False), atol=1e-5)
    True
    """
    require("merge_attention", out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    out, lse = _ops.call(
        "merge_fwd", {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    )
    return out, lse
