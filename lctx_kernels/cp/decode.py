"""Decoding with a cache of keys that lies on many ranks: partial results travel, keys do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtypes import autocast, dtype_name, stat_dtype
from .agree import announce_refusal, begin
from .gather import exchange
from .groups import never_compiled

OP = "cp.decode_attention"


@never_compiled
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention of a few new queries over the keys that all ranks of a group hold.

    Every rank attends to its own keys, and the fp32 partial results of all ranks are merged: what
    travels depends on the number of queries, not on that of keys. For inference: no gradients.

    Args:
        q: (B, Tq, Hq, Dk) queries, the same on every rank; each sees all keys of all ranks, but for
            `causal`.
        k: (B, L, Hkv, Dk) this rank's part of the cache; L may differ between ranks, 0 too.
        v: (B, L, Hkv, Dv) its values.
        group: ProcessGroup, 1-D DeviceMesh, or None for the default group.
        scale: Factor on the scores; None is Dk**-0.5.
        causal: This rank's last Tq keys are those of the queries' own tokens, of which a query sees
            its own and those before, as in `flash_attention`. True on one rank at most.

    Returns:
        out (B, Tq, Hq, Dv) in q's dtype, the same bits on every rank.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, strides, groups or values that do not fit, on this rank or on another.
        NotImplementedError: A gradient is wanted, or no kernel for this device.
        RingError: A rank that is late, gone, or called with other arguments.

    Source: Dao et al. 2023, Flash-Decoding (split keys and merge), over ranks.
    Equivalent to: lctx_kernels.flash_attention with causal=False over the keys of all ranks.

    >>> import torch
    >>> from lctx_kernels import cp
    >>> cp.decode_attention(*torch.zeros(3, 1, 1, 2, 8))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: cp.decode_attention cannot run:
      - group is None and there is no default process group; ...
    """
    from .._checks import require  # which has the checks of this package, and this op, too

    try:
        require(OP, q=q, k=k, v=v, group=group, scale=scale, causal=causal)
    except (TypeError, ValueError, NotImplementedError) as error:
        announce_refusal(OP, (q, k, v), group, error)
        raise
    q, k, v = autocast(q), autocast(k), autocast(v)
    note = {
        "queries": list(q.shape), "key heads": k.shape[2], "head dims": [k.shape[3], v.shape[3]],
        "dtype": dtype_name(q.dtype), "scale": scale,
    }  # fmt: skip
    transport = begin(group, OP, q, note)
    stat = stat_dtype(q.dtype)
    (B, Tq, Hq, Dk), Dv = q.shape, v.shape[-1]
    carry = q.new_zeros(B, Tq, Hq, Dv, dtype=stat)
    lse = q.new_full((B, Hq, Tq), -torch.inf, dtype=stat)
    if L := k.shape[1]:
        factor = Dk**-0.5 if scale is None else float(scale)
        torch.ops.lctx.flash_carry(q, k, v, carry, lse, causal, factor, 0, L - Tq, 0, False, True)
    own = torch.cat([carry, lse.transpose(1, 2).unsqueeze(-1)], -1)
    parts = torch.stack(exchange(transport, "forward decode", [own] * transport.world_size))
    outs, statistics = parts[..., :-1], parts[..., -1:]
    top = statistics.amax(0).clamp(min=torch.finfo(stat).min)  # finite, where no rank has a key
    weights = (statistics - top).exp()
    return ((weights * outs).sum(0) / weights.sum(0).clamp(min=1e-30)).to(q.dtype)
