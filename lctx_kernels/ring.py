"""Ring attention: key/value shards of one long sequence travel round the GPUs that share it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _ops
from ._checks import require
from ._dtypes import autocast
from .cp import ops as _ring_ops  # registers lctx::ring_fwd, lctx::ring_bwd
from .cp.checks import TRANSPORTS, plan_spec
from .cp.choose import choose
from .cp.groups import SIM, lacks_backend, process_group
from .cp.plan import Plan
from .cp.process_group import ANNOUNCE_SECONDS
from .cp.transport import RingError

assert _ring_ops


@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group: Any = ..., plan: Plan | None = ...,
    layout: str = ..., causal: bool = ..., scale: float | None = ..., window: int | None = ...,
    cu_seqlens: Tensor | None = ..., deterministic: bool = ..., transport: str = ...,
    timeout: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group: Any = ..., plan: Plan | None = ...,
    layout: str = ..., causal: bool = ..., scale: float | None = ..., window: int | None = ...,
    cu_seqlens: Tensor | None = ..., deterministic: bool = ..., transport: str = ...,
    timeout: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    plan: Plan | None = None,
    layout: str = "zigzag",
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    deterministic: bool = True,
    transport: str = "auto",
    timeout: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over a sequence that is split over the ranks of a group.

    Keys and values travel from rank to rank; every rank keeps fp32 (out, lse) of its own queries,
    and in the backward fp32 dk, dv travel with their keys. Forward and backward are one op each.

    Args:
        q: (B, L, Hq, Dk) queries of this rank, its rows of the plan (`cp.shard`); L may differ
            between ranks, 0 too. fp32, fp64, bf16 or fp16, any strides with stride(-1) == 1.
        k: (B, L, Hkv, Dk) keys of this rank; query head h reads key/value head h // (Hq // Hkv).
        v: (B, L, Hkv, Dv) values of this rank.
        group: ProcessGroup, 1-D DeviceMesh, or None for the default group.
        plan: `cp.Plan`; None makes one from `layout` and the equal lengths of all ranks.
        layout: "zigzag", "striped" or "contiguous": which positions of the whole sequence the rows
            have, without a plan.
        causal: A query sees the keys up to its own position in the whole sequence.
        scale: Factor on the scores; None is Dk**-0.5.
        window: Position i sees key j only if |i - j| < window (tokens); None is no limit. Hops that
            no rank needs are left out.
        cu_seqlens: (documents + 1,) int32, starts of packed documents in the whole sequence, which
            do not see each other; needs B = 1. None: the documents of the plan, in every row of
            the batch.
        deterministic: Bitwise equal gradients from run to run.
        transport: How shards travel: "pg" by torch.distributed; between GPUs "p2p" by the copy
            engine inside one host, "nccl" by a communicator of this package; "auto" takes the first
            that all ranks can use of p2p, nccl and pg, on CPUs pg. "sim" computes all ranks in this
            process, where q, k, v hold the rows of all ranks one after another (`cp.shard` with
            rank=None) and a plan says how many there are.
        timeout: Seconds until a hop that does not happen is a RingError; None is the group's own.
            On GPUs the next call raises it, or `cp.synchronize`; what was computed since is void.
        return_lse: Return the natural logarithm of the softmax denominators too. Differentiable.

    Returns:
        out (B, L, Hq, Dv) of this rank in q's dtype, or (out, lse) with lse (B, Hq, L) fp32 (fp64
        for fp64). A row that sees no key has out 0, lse -inf and gradients 0.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, strides, plans, groups or values that do not fit, on this rank or on
            another one; nothing has been sent then.
        NotImplementedError: Legal, but not built or no kernel for this device; or a CUDA graph is
            being captured.
        cp.RingError: A rank that is late, gone, or called with other arguments, or that stopped in
            the middle. It names rank, step, phase, peers and bytes; the group is given up.

    Source: Liu et al. 2023 (arXiv 2310.01889), algorithm 1.
    Equivalent to: lctx_kernels.reference.ring_attention, which loops over simulated ranks.

    >>> import torch
    >>> from lctx_kernels import cp, flash_attention, ring_attention
    >>> q, k, v = torch.randn(3, 1, 100, 4, 16)
    >>> plan = cp.make_plan(100, 4)
    >>> parts = (cp.shard(plan, x, 1, None) for x in (q, k, v))
    >>> out = cp.unshard(plan, ring_attention(*parts, plan=plan, transport="sim"), 1, "sim")
    >>> torch.allclose(out, flash_attention(q, k, v), atol=1e-5)
    True
    """
    try:
        require(
            "ring_attention", q=q, k=k, v=v, group=group, plan=plan, layout=layout, causal=causal,
            scale=scale, window=window, cu_seqlens=cu_seqlens, deterministic=deterministic,
            transport=transport, timeout=timeout, return_lse=return_lse,
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        if not torch.compiler.is_compiling():
            _announce_refusal((q, k, v), group, transport, str(error))
        raise
    members = None if transport == SIM else process_group(group, "ring_attention")
    world_size = 1 if members is None else members.size()
    out, lse = _ops.call("ring_fwd", {
        "q": autocast(q), "k": autocast(k), "v": autocast(v),
        "plan": plan_spec(plan, layout, q.shape[1] * world_size, world_size, cu_seqlens),
        "group": "" if members is None else members.group_name,
        "transport": transport, "causal": causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
        "window": 0 if window is None else window,
        "timeout": 0.0 if timeout is None else float(timeout), "deterministic": deterministic,
    })  # fmt: skip
    return (out, lse) if return_lse else out


def _announce_refusal(qkv: Sequence[Any], group: Any, transport: str, error: str) -> None:
    """Let the other ranks know of a call that this one refuses: they would wait for it."""
    x = next((x for x in qkv if isinstance(x, Tensor)), None)
    if transport == SIM or x is None:
        return
    with contextlib.suppress(TypeError, ValueError, NotImplementedError, RingError):
        members = process_group(group, "ring_attention")
        if lacks_backend(members, x.device) is None:
            kind = transport if x.is_cuda and transport in TRANSPORTS else "auto"
            choose(members, x.device, kind, ANNOUNCE_SECONDS).announce(error)
