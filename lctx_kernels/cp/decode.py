"""Decoding with a cache of keys that lies on many ranks: partial results travel, keys do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtypes import dtype_name, stat_dtype
from .gather import begin, exchange
from .groups import never_compiled


@never_compiled
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, *, group: Any = None, scale: float | None = None
) -> Tensor:
    """Attention of a few new queries over the keys that all ranks of a group hold.

    Every rank attends to its own keys, and the fp32 partial results of all ranks are merged: what
    travels depends on the number of queries, not on that of keys. For inference: no gradients.

    Args:
        q: (B, Tq, Hq, Dk) queries, the same on every rank; each sees all keys of all ranks.
        k: (B, L, Hkv, Dk) this rank's part of the cache; L may differ between ranks, 0 too.
        v: (B, L, Hkv, Dv) its values.
        group: ProcessGroup, 1-D DeviceMesh, or None for the default group.
        scale: Factor on the scores; None is Dk**-0.5.

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype, the same bits on every rank.

    Raises:
        NotImplementedError: A gradient is wanted.
        TypeError, ValueError: No group; tensors that do not fit; or ranks that do other things.
        RingError: A rank that is late, gone, or called with other arguments.

    Source: Dao et al. 2023, Flash-Decoding (split keys and merge), over ranks.
    Equivalent to: lctx_kernels.flash_attention with causal=False over the keys of all ranks.

    >>> import torch
    >>> from lctx_kernels import cp
    >>> cp.decode_attention(*torch.zeros(3, 1, 1, 2, 8))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: cp.decode_attention: group is None and there is no default process group; ...
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError(
            "cp.decode_attention has no backward; expected torch.no_grad() or tensors without "
            "requires_grad; nearest is ring_attention"
        )
    note = {
        "queries": list(q.shape), "key heads": k.shape[2], "head dims": [k.shape[3], v.shape[3]],
        "dtype": dtype_name(q.dtype), "scale": scale,
    }  # fmt: skip
    transport = begin(group, "cp.decode_attention", q, note)
    stat = stat_dtype(q.dtype)
    (B, Tq, Hq, Dk), Dv = q.shape, v.shape[-1]
    carry = q.new_zeros(B, Tq, Hq, Dv, dtype=stat)
    lse = q.new_full((B, Hq, Tq), -torch.inf, dtype=stat)
    torch.ops.lctx.flash_carry(
        q, k, v, carry, lse, False, Dk**-0.5 if scale is None else scale, 0, 0, 0, False
    )
    own = torch.cat([carry, lse.transpose(1, 2).unsqueeze(-1)], -1)
    parts = torch.stack(exchange(transport, "forward decode", [own] * transport.world_size))
    outs, statistics = parts[..., :-1], parts[..., -1:]
    top = statistics.amax(0).clamp(min=torch.finfo(stat).min)  # finite, where no rank has a key
    weights = (statistics - top).exp()
    return ((weights * outs).sum(0) / weights.sum(0).clamp(min=1e-30)).to(q.dtype)
