"""Exact softmax attention."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import _ops, reference
from ._checks import require
from ._dtypes import autocast, without_autocast


@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., scale: float | None = ...,
    window: int | None = ..., cu_seqlens: Tensor | None = ..., return_lse: Literal[False] = ...,
    deterministic: bool = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., scale: float | None = ...,
    window: int | None = ..., cu_seqlens: Tensor | None = ..., return_lse: Literal[True],
    deterministic: bool = ..., backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention with tiles and an online softmax: memory linear in T.

    Args:
        q: (B, Tq, Hq, Dk) queries, the last Tq of the Tk positions; fp32, fp64, bf16 or fp16, any
            strides with stride(-1) == 1.
        k: (B, Tk, Hkv, Dk) keys; query head h reads key/value head h // (Hq // Hkv).
        v: (B, Tk, Hkv, Dv) values.
        causal: A query sees the keys up to its own position.
        scale: Factor on the scores; None is Dk**-0.5.
        window: Position i sees key j only if |i - j| < window (tokens); None is no limit.
        cu_seqlens: (documents + 1,) int32, starts of packed documents and T, which do not see each
            other; needs B = 1 and Tq = Tk.
        return_lse: Return the natural logarithm of the softmax denominators too. Differentiable.
        deterministic: Bitwise equal gradients from run to run.
        backend: "auto" (that of the tensors' device), "cpu", "cuda" or "reference".

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype, or (out, lse) with lse (B, Hq, Tq) fp32 (fp64 for fp64).
        A row that sees no key has out 0, lse -inf and gradients 0.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, strides, devices or values that do not fit.
        NotImplementedError: Legal, but no kernel for this device.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; Dao et al. 2022 (arXiv 2205.14135),
    algorithm 1.
    Equivalent to: lctx_kernels.reference.flash_attention.

    >>> import torch
    >>> from lctx_kernels import flash_attention
    >>> q, k, v = torch.randn(3, 2, 100, 8, 64)
    >>> flash_attention(q, k, v, window=16).shape
    torch.Size([2, 100, 8, 64])
    """
    where = require(
        "flash_attention", q=q, k=k, v=v, causal=causal, scale=scale, window=window,
        cu_seqlens=cu_seqlens, return_lse=return_lse, deterministic=deterministic, backend=backend,
    )  # fmt: skip
    q, k, v = autocast(q), autocast(k), autocast(v)
    if where == "reference":
        with without_autocast(q.device.type):
            out, lse = reference.flash_attention(
                q, k, v, causal=causal, scale=scale, window=window, cu_seqlens=cu_seqlens
            )
    else:
        out, lse = _ops.call("flash_fwd", {
            "q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "causal": causal,
            "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
            "window": 0 if window is None else window, "deterministic": deterministic,
        })  # fmt: skip
    return (out, lse) if return_lse else out
