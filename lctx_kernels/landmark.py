"""Landmark attention: a block of earlier tokens weighs what its landmark token weighs."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _ops, reference
from ._checks import require
from ._dtypes import autocast, without_autocast
from ._operands import describe, values_readable
from .cp.agree import announce_refusal
from .cp.landmark import landmark_over_ranks


@overload
def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int | None = ...,
    is_landmark: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
    deterministic: bool = ..., group: Any = ..., plan: Any = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int | None = ...,
    is_landmark: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[True],
    deterministic: bool = ..., group: Any = ..., plan: Any = ..., backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | None = None,
    is_landmark: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    group: Any = None,
    plan: Any = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention with a grouped softmax: each earlier block is gated by its landmark.

    A row has one softmax over the ordinary keys of its own block and the landmarks of earlier
    blocks; the weight of a landmark is shared out by a softmax over the ordinary keys of its block.
    Rows sum to 1 and the values of landmarks are never read. Exactly one of `block_size` and
    `is_landmark` is given.

    Args:
        q: (B, Tq, Hq, Dk) queries, the last Tq of the Tk positions; fp32, fp64, bf16 or fp16, any
            strides with stride(-1) == 1.
        k: (B, Tk, Hkv, Dk) keys; query head h reads key/value head h // (Hq // Hkv).
        v: (B, Tk, Hkv, Dv) values.
        block_size: Positions block_size - 1, 2 * block_size - 1, ... are landmarks (tokens, >= 2,
            the landmark counted); the last block may be incomplete.
        is_landmark: (B, Tk) bool, landmarks anywhere and any number of them.
        scale: Factor on the scores; None is Dk**-0.5.
        return_lse: Return the logarithm of the first softmax's denominators too. Differentiable.
        deterministic: Bitwise equal gradients from run to run.
        group: ProcessGroup or 1-D DeviceMesh whose ranks share the sequence; None with a plan is
            the default group.
        plan: `cp.Plan` of consecutive tokens ("zigzag", "contiguous"): q, k, v are this rank's
            rows of it. Every rank gathers the keys of the whole sequence.
        backend: "auto" (that of the tensors' device), "cpu", "cuda" or "reference".

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype, or (out, lse) with lse (B, Hq, Tq) fp32 (fp64 for fp64).
        A row that sees no key (a landmark at position 0) has out 0, lse -inf and gradients 0.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, strides, devices or values that do not fit.
        NotImplementedError: Legal, but no kernel for this device.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.1.
    Equivalent to: lctx_kernels.reference.landmark_attention.

    >>> import torch
    >>> from lctx_kernels import landmark_attention
    >>> q, k, v = torch.randn(3, 1, 100, 4, 32)
    >>> out, lse = landmark_attention(q, k, v, block_size=64, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 100, 4, 32]), torch.Size([1, 4, 100]))
    """
    try:
        where = require(
            "landmark_attention", q=q, k=k, v=v, block_size=block_size, is_landmark=is_landmark,
            scale=scale, return_lse=return_lse, deterministic=deterministic, group=group, plan=plan,
            backend=backend,
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        if plan is not None:
            announce_refusal("landmark_attention", (q, k, v), group, error)
        raise
    q, k, v = autocast(q), autocast(k), autocast(v)
    if plan is not None:

        def attend(a: Tensor, b: Tensor, c: Tensor, marks: Tensor | None) -> Any:
            return landmark_attention(
                a, b, c, block_size=block_size, is_landmark=marks, scale=scale, return_lse=True,
                deterministic=deterministic, backend=backend,
            )  # fmt: skip

        out, lse = landmark_over_ranks(
            attend, q, k, v, is_landmark, options={"block_size": block_size, "scale": scale},
            group=group, plan=plan,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    if where == "reference":
        with without_autocast(q.device.type):
            out, lse = reference.landmark_attention(
                q, k, v, block_size=block_size, is_landmark=is_landmark, scale=scale
            )
    else:
        out, lse = _ops.call("landmark_fwd", {
            "q": q, "k": k, "v": v, "is_landmark": is_landmark,
            "block_size": 0 if block_size is None else block_size,
            "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
            "deterministic": deterministic,
        })  # fmt: skip
    return (out, lse) if return_lse else out


def fused_landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_mem: Tensor,
    sm_scale: float | None = None,
    block_size: int = 64,
) -> Tensor:
    """Landmark attention under the name, layout and arguments of the method's own repository.

    Args:
        q: (B, H, Tq, D) queries, the last Tq of the Tk positions.
        k: (B, H, Tk, D) keys, or fewer heads than q by a whole factor.
        v: (B, H, Tk, D) values.
        is_mem: (..., Tk) bool, one row or B rows, True at the last token of every whole block.
        sm_scale: Factor on the scores; None is D**-0.5.
        block_size: Length of a block (tokens, >= 2, the landmark counted).

    Returns:
        out (B, H, Tq, D).

    Raises:
        TypeError, ValueError, NotImplementedError: As `landmark_attention`, to which it leads; and
            ValueError where `is_mem` and `block_size` disagree (seen on CPU tensors only).

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.1.
    Equivalent to: lctx_kernels.reference.landmark_attention on transposed tensors.

    >>> import torch
    >>> from lctx_kernels import fused_landmark_attention
    >>> q, k, v = torch.randn(3, 1, 4, 128, 32)
    >>> is_mem = torch.arange(128) % 64 == 63
    >>> fused_landmark_attention(q, k, v, is_mem, block_size=64).shape
    torch.Size([1, 4, 128, 32])
    """
    is_landmark = _landmark_rows(k, is_mem, block_size)
    q, k, v = map(_to_bthd, (q, k, v))
    out = landmark_attention(q, k, v, is_landmark=is_landmark, scale=sm_scale)
    return out.transpose(1, 2)


def _to_bthd(x: Tensor) -> Tensor:
    """(B, H, T, D) as (B, T, H, D); anything else is left for `landmark_attention` to refuse."""
    return x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x


def _landmark_rows(k: Tensor, is_mem: Tensor, block_size: int) -> Tensor:
    """`is_mem` as (B, Tk), after checking what `landmark_attention` cannot see."""
    op = "fused_landmark_attention"
    if isinstance(block_size, bool) or not isinstance(block_size, int | torch.SymInt):
        raise TypeError(f"{op}: block_size is {block_size!r}; expected an int >= 2")
    if block_size < 2:
        raise ValueError(f"{op}: block_size is {block_size}; expected an int >= 2; nearest is 2")
    if not isinstance(is_mem, Tensor) or is_mem.dtype != torch.bool:
        raise TypeError(f"{op}: is_mem is {describe(is_mem)}; expected a bool tensor (..., Tk)")
    if not isinstance(k, Tensor) or k.dim() != 4:
        raise ValueError(f"{op}: k is {describe(k)}; expected a tensor (B, H, Tk, D)")
    B, Tk = k.shape[0], k.shape[2]
    rows = is_mem.reshape(-1, is_mem.shape[-1]) if is_mem.dim() > 0 else is_mem.reshape(1, 1)
    if rows.shape[1] != Tk or rows.shape[0] not in (1, B):
        raise ValueError(
            f"{op}: is_mem is {describe(is_mem)}; expected one row or B = {B} rows of Tk = {Tk}"
        )
    regular = torch.arange(Tk, device=rows.device) % block_size == block_size - 1
    if values_readable(rows) and not bool((rows == regular).all()):
        raise ValueError(
            f"{op}: is_mem is not True exactly at every {block_size}th position (block_size = "
            f"{block_size}); try landmark_attention(..., is_landmark=...), which takes any places"
        )
    return rows.expand(B, Tk)
