"""Infini-attention: local softmax attention and a compressive memory of all earlier segments."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import _ops, reference
from ._checks import require
from ._dtypes import autocast, without_autocast
from .cp.agree import announce_refusal
from .cp.infini import infini_over_ranks


class InfiniMemory(NamedTuple):
    """The state that stands for everything read so far; its size does not depend on how much.

    M: (B, Hkv, Dk, Dv), z: (B, Hkv, Dk), both fp32 (fp64 for fp64 inputs).
    """

    M: Tensor
    z: Tensor


def infini_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mem: InfiniMemory | tuple[Tensor, Tensor] | None = None,
    *,
    gate: Tensor | None = None,
    q_mem: Tensor | None = None,
    k_mem: Tensor | None = None,
    segment_len: int = 2048,
    update: str = "linear",
    first: str = "gate",
    detach_every: int = 0,
    scale: float | None = None,
    deterministic: bool = False,
    group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, InfiniMemory]:
    """Causal attention inside segments, gated with what a memory of earlier segments retrieves.

    Every call starts a new segment and closes its last one, however short: a call on a long
    sequence equals calls on its segment-aligned pieces that pass `mem` along.

    Args:
        q: (B, T, Hq, Dk) queries; fp32, fp64, bf16 or fp16, any strides with stride(-1) == 1.
        k: (B, T, Hkv, Dk) keys; query head h reads key/value head h // (Hq // Hkv).
        v: (B, T, Hkv, Dv) values.
        mem: Memory of what came before; None is the empty memory. Differentiable.
        gate: (Hq,) logits, fp32 (fp64 for fp64): out = g * retrieved + (1 - g) * local with
            g = sigmoid(gate); None is zeros.
        q_mem: (B, T, Hq, Dk) queries without position embedding, for the memory; None is q.
        k_mem: (B, T, Hkv, Dk) keys without position embedding, for the memory; None is k.
        segment_len: Length of a segment (tokens, >= 1).
        update: "linear" adds phi(k)^T v; "delta" first subtracts what the memory holds already.
        first: First segment of a call without `mem`: "gate" gives (1 - g) * local, "bypass" local.
        detach_every: n > 0 cuts the gradient through the memory every n segments; 0 never.
        scale: Factor on the scores; None is Dk**-0.5.
        deterministic: Bitwise equal gradients from run to run.
        group: ProcessGroup or 1-D DeviceMesh whose ranks hold consecutive pieces of the sequence,
            rank by rank, whole segments but for the last; `mem` is the same on all of them, and the
            returned memory is that after the last rank. What travels does not depend on T. The
            gradients of `mem` and `gate` are this rank's share: their sum over the ranks counts.
        backend: "auto" (that of the tensors' device), "cpu", "cuda" or "reference".

    Returns:
        out (B, T, Hq, Dv) in q's dtype, and the memory after the last segment.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, strides, devices or values that do not fit.
        NotImplementedError: Legal, but no kernel for this device.
        cp.RingError: With a group, a rank that is late, gone, or called with other arguments.

    Source: Munkhdalai et al. 2024 (arXiv 2404.07143), section 2.1, eq. 3 to 10.
    Equivalent to: lctx_kernels.reference.infini_attention.

    >>> import torch
    >>> from lctx_kernels import infini_attention
    >>> q, k, v = torch.randn(3, 1, 96, 4, 16)
    >>> out, mem = infini_attention(q, k, v, segment_len=32)
    >>> head, mem = infini_attention(q[:, :64], k[:, :64], v[:, :64], segment_len=32)
    >>> tail, mem = infini_attention(q[:, 64:], k[:, 64:], v[:, 64:], mem, segment_len=32)
    >>> torch.allclose(torch.cat([head, tail], dim=1), out, atol=1e-5)
    True
    """
    try:
        where = require(
            "infini_attention", q=q, k=k, v=v, mem=mem, gate=gate, q_mem=q_mem, k_mem=k_mem,
            segment_len=segment_len, update=update, first=first, detach_every=detach_every,
            scale=scale, deterministic=deterministic, group=group, backend=backend,
        )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        if group is not None:
            announce_refusal("infini_attention", (q, k, v), group, error)
        raise
    q, k, v = autocast(q), autocast(k), autocast(v)
    q_mem = None if q_mem is None else autocast(q_mem)
    k_mem = None if k_mem is None else autocast(k_mem)
    if group is not None:

        def local(values: Tensor, state: tuple[Tensor, Tensor] | None) -> Any:
            return infini_attention(
                q, k, values, state, gate=gate, q_mem=q_mem, k_mem=k_mem, segment_len=segment_len,
                update=update, first=first, detach_every=detach_every, scale=scale,
                deterministic=deterministic, backend=backend,
            )  # fmt: skip

        out, state = infini_over_ranks(
            local, k if k_mem is None else k_mem, v, mem, segment_len=segment_len, update=update,
            detach_every=detach_every, options={"first": first, "scale": scale}, group=group,
        )  # fmt: skip
        return out, InfiniMemory(*state)
    if where == "reference":
        with without_autocast(q.device.type):
            out, (M, z) = reference.infini_attention(
                q, k, v, mem, gate=gate, q_mem=q_mem, k_mem=k_mem, segment_len=segment_len,
                update=update, first=first, detach_every=detach_every, scale=scale,
            )  # fmt: skip
    else:
        M_in, z_in = (None, None) if mem is None else mem
        inputs = (q, k, v, M_in, z_in, gate, q_mem, k_mem)
        out, _, _, _, _, M, z, _ = _ops.call("infini_fwd", {
            "q": q, "k": k, "v": v, "q_mem": q_mem, "k_mem": k_mem, "M": M_in, "z": z_in,
            "gate": gate, "segment_len": segment_len, "update": update, "first": first,
            "detach_every": detach_every,
            "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
            "save_local": _ops.needs_grad(*inputs), "deterministic": deterministic,
        })  # fmt: skip
    return out, InfiniMemory(M, z)
