"""Ring attention: key/value shards of one long sequence travel round the GPUs that share it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import require


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    plan: Any = None,
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

    Not built yet: raises NotImplementedError, whose message says what is missing.

    Args:
        q: (B, L, Hq, Dk) queries of this rank, laid out by the plan; L may differ between ranks.
        k: (B, L, Hkv, Dk) keys of this rank; query head h reads key/value head h // (Hq // Hkv).
        v: (B, L, Hkv, Dv) values of this rank.
        group: ProcessGroup, 1-D DeviceMesh, or None for the default group.
        plan: `cp.Plan`; None makes one from `layout` and equal local lengths.
        layout: "zigzag", "striped" or "contiguous".
        causal: A query sees the keys up to its own position in the whole sequence.
        scale: Factor on the scores; None is Dk**-0.5.
        window: Position i sees key j only if |i - j| < window (tokens); None is no limit.
        cu_seqlens: (documents + 1,) int32, starts of packed documents in the whole sequence.
        deterministic: Bitwise equal gradients from run to run.
        transport: How shards travel; "auto" chooses.
        timeout: Seconds until a stuck hop becomes an exception; None is the group's own.
        return_lse: Return the natural logarithm of the softmax denominators too.

    Returns:
        out (B, L, Hq, Dv) of this rank, or (out, lse) with lse (B, Hq, L).

    Raises:
        NotImplementedError: Always, today.

    Source: Liu et al. 2023 (arXiv 2310.01889), algorithm 1.
    Equivalent to: lctx_kernels.reference.ring_attention, which loops over simulated ranks.

    >>> from lctx_kernels import supports
    >>> len(supports("ring_attention"))
    1
    """
    require(
        "ring_attention", q=q, k=k, v=v, group=group, plan=plan, layout=layout, causal=causal,
        scale=scale, window=window, cu_seqlens=cu_seqlens, deterministic=deterministic,
        transport=transport, timeout=timeout, return_lse=return_lse,
    )  # fmt: skip
    raise AssertionError("unreachable: require() refuses ring_attention")
