"""LongNet's dilated attention: a union of sparse attentions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from . import _ops, reference
from ._checks import require
from ._dtypes import autocast, without_autocast
from .cp.agree import announce_refusal
from .cp.dilated import dilated_over_ranks
from .cp.plan import Plan
from .ring import ring_attention


@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, segment_lengths: Sequence[int], dilation_rates: Sequence[int],
    *, causal: bool = ..., scale: float | None = ..., head_offset: str = ..., mix_grad: str = ...,
    seqlens: Tensor | None = ..., return_lse: Literal[False] = ..., deterministic: bool = ...,
    group: Any = ..., plan: Any = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, segment_lengths: Sequence[int], dilation_rates: Sequence[int],
    *, causal: bool = ..., scale: float | None = ..., head_offset: str = ..., mix_grad: str = ...,
    seqlens: Tensor | None = ..., return_lse: Literal[True], deterministic: bool = ...,
    group: Any = ..., plan: Any = ..., backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool = True,
    scale: float | None = None,
    head_offset: str = "mod",
    mix_grad: str = "exact",
    seqlens: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    group: Any = None,
    plan: Any = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the union of the keys that several dilated branches select.

    Branch (w, r) cuts the sequence into segments of w tokens and keeps, for each head, every r-th
    token of a segment; kept tokens see the kept tokens of their segment. A key that several
    branches select counts once per branch. Tokens that no branch selects for a head get 0.

    Args:
        q: (B, T, Hq, Dk) queries; fp32, fp64, bf16 or fp16, any strides with stride(-1) == 1.
        k: (B, T, Hkv, Dk) keys; query head h reads key/value head h // (Hq // Hkv).
        v: (B, T, Hkv, Dv) values.
        segment_lengths: Length w of each branch's segments (tokens, >= 1), clipped to T.
        dilation_rates: Dilation r of each branch (tokens, >= 1), as many as segment_lengths.
        causal: A query sees the keys up to its own position.
        scale: Factor on the scores; None is Dk**-0.5.
        head_offset: First kept token of head h: "mod", h mod r; "block", h // ceil(Hq / r).
        mix_grad: "exact" gradients, or "detached": the mixing weights of the branches count as
            constants in the backward.
        seqlens: (B,) int32, true lengths of right-padded rows; pads give 0 and are never seen.
        return_lse: Return the logarithm of the denominators over all branches too. Differentiable.
        deterministic: Bitwise equal gradients from run to run.
        group: ProcessGroup or 1-D DeviceMesh whose ranks share the sequence; None with a plan is
            the default group.
        plan: `cp.Plan` of consecutive tokens ("zigzag", "contiguous"): q, k, v are this rank's
            rows of it. Nothing travels for segments that lie inside ranks of a contiguous
            plan, else 1 / rate of the rows of a key head, for each phase that reads it.
        backend: "auto" (that of the tensors' device), "cpu", "cuda" or "reference".

    Returns:
        out (B, T, Hq, Dv) in q's dtype, or (out, lse) with lse (B, Hq, T) fp32 (fp64 for fp64).
        Pads and tokens that no branch selects have out 0, lse -inf and gradients 0.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, strides, devices or values that do not fit.
        NotImplementedError: Legal, but no kernel for this device; or `seqlens` over ranks.
        cp.RingError: With a plan, a rank that is late, gone, or called with other arguments.

    Source: Ding et al. 2023 (arXiv 2307.02486), sections 2.2 and 2.3.
    Equivalent to: lctx_kernels.reference.dilated_attention.

    >>> import torch
    >>> from lctx_kernels import dilated_attention
    >>> q, k, v = torch.randn(3, 1, 128, 4, 32)
    >>> dilated_attention(q, k, v, segment_lengths=(32, 128), dilation_rates=(1, 4)).shape
    torch.Size([1, 128, 4, 32])
    """
    try:
        where = require(
            "dilated_attention", q=q, k=k, v=v, segment_lengths=segment_lengths,
            dilation_rates=dilation_rates, causal=causal, scale=scale, head_offset=head_offset,
            mix_grad=mix_grad, seqlens=seqlens, return_lse=return_lse, deterministic=deterministic,
            group=group, plan=plan, backend=backend,
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        if plan is not None:
            announce_refusal("dilated_attention", (q, k, v), group, error)
        raise
    q, k, v = autocast(q), autocast(k), autocast(v)
    if plan is not None:

        def local(lengths: list[int], rates: list[int]) -> tuple[Tensor, Tensor]:
            return dilated_attention(
                q, k, v, lengths, rates, causal=causal, scale=scale, head_offset=head_offset,
                mix_grad=mix_grad, deterministic=deterministic, backend=backend, return_lse=True,
            )  # fmt: skip

        def ring(a: Tensor, b: Tensor, c: Tensor, own: Plan) -> tuple[Tensor, Tensor]:
            return ring_attention(
                a, b, c, group=group, plan=own, causal=causal, scale=scale,
                deterministic=deterministic, return_lse=True,
            )  # fmt: skip

        branches = list(zip(segment_lengths, dilation_rates, strict=True))
        out, lse = dilated_over_ranks(
            local, ring, q, k, v, branches, head_offset=head_offset, mix_grad=mix_grad,
            options={"causal": causal, "scale": scale}, group=group, plan=plan,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    if where == "reference":
        with without_autocast(q.device.type):
            out, lse = reference.dilated_attention(
                q, k, v, segment_lengths, dilation_rates, causal=causal, scale=scale,
                head_offset=head_offset, mix_grad=mix_grad, seqlens=seqlens,
            )  # fmt: skip
    else:
        out, lse = _ops.call("dilated_fwd", {
            "q": q, "k": k, "v": v, "seqlens": seqlens, "segment_lengths": list(segment_lengths),
            "dilation_rates": list(dilation_rates), "causal": causal,
            "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
            "head_offset": head_offset, "mix_grad": mix_grad, "deterministic": deterministic,
        })  # fmt: skip
    return (out, lse) if return_lse else out
