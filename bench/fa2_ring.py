"""The rival of `bench.ring`: a zigzag ring of ordinary parts, on FlashAttention-2.

What a good ring is without kernels of its own: the FlashAttention-2 that torch carries, one
exchange of keys and values a step by the process group, started before the step's kernel, partial
results merged in fp32 by torch, and in the backward fp32 sums of dk and dv that travel after their
keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

FA2 = torch.ops.aten._flash_attention_forward
FA2_BACKWARD = torch.ops.aten._flash_attention_backward


class Exchange:
    """Tensors on their way to the next rank, and those of the one before on theirs to this one."""

    def __init__(self, *sent: Tensor) -> None:
        rank, n = dist.get_rank(), dist.get_world_size()
        self.sent, self.received = sent, [torch.empty_like(x) for x in sent]
        ops = [dist.P2POp(dist.isend, x, (rank + 1) % n) for x in sent]
        ops += [dist.P2POp(dist.irecv, x, (rank - 1) % n) for x in self.received]
        self.works = dist.batch_isend_irecv(ops)

    def wait(self) -> list[Tensor]:
        """What came, for the stream."""
        for work in self.works:
            work.wait()
        return self.received


class Step(NamedTuple):
    """Rows of the queries and of the keys that a step works on."""

    rows: slice
    keys: slice
    causal: bool


def step_of(step: int, length: int) -> Step:
    """A causal square of the own keys; then half of the keys, or half of the rows."""
    everything, half = slice(0, length), length // 2
    if step == 0:
        return Step(everything, everything, True)
    if step <= dist.get_rank():
        return Step(everything, slice(0, half), False)
    return Step(slice(half, length), everything, False)


def _merge(out: Tensor, lse: Tensor, rows: slice, part: Tensor, part_lse: Tensor) -> None:
    """out (B, L, H, D) and lse (B, H, L), fp32, take in a partial result of some rows."""
    before = lse[:, :, rows]
    both = torch.logaddexp(before, part_lse)
    keep, add = ((x - both).exp().transpose(1, 2)[..., None] for x in (before, part_lse))
    out[:, rows].mul_(keep).addcmul_(part.float(), add)
    lse[:, :, rows] = both


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = lse = seed = unused = torch.empty(0)
    for step in range(dist.get_world_size()):
        coming = Exchange(k, v) if step + 1 < dist.get_world_size() else None
        at = step_of(step, q.shape[1])
        queries, keys, values = q[:, at.rows], k[:, at.keys], v[:, at.keys]
        part, part_lse, seed, unused, _ = FA2(
            queries,
            keys,
            values,
            None,
            None,
            queries.shape[1],
            keys.shape[1],
            0.0,
            at.causal,
            False,
        )
        if step == 0:
            out, lse = part.float(), part_lse.clone()
        else:
            _merge(out, lse, at.rows, part, part_lse)
        if coming is not None:
            k, v = coming.wait()
    return out.to(q.dtype), lse, seed, unused


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor,
    unused: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = dist.get_world_size()
    dq = torch.zeros_like(q, dtype=torch.float32)
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (k, v)]
    passing: Exchange | None = None
    for step in range(n):
        coming = Exchange(k, v) if step + 1 < n else None
        at = step_of(step, q.shape[1])
        rows, keys = at.rows, at.keys
        of_rows = [x[:, rows] for x in (dout, q)]
        length, width = of_rows[1].shape[1], keys.stop - keys.start
        grads = FA2_BACKWARD(
            *of_rows, k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows].contiguous(),
            None, None, length, width, 0.0, at.causal, seed, unused,
        )  # fmt: skip
        dq[:, rows] += grads[0]
        if passing is not None:
            sums = passing.wait()
        for total, grad in zip(sums, grads[1:], strict=True):
            total[:, keys] += grad
        passing = Exchange(*sums)
        if coming is not None:
            k, v = coming.wait()
    assert passing is not None
    return dq.to(q.dtype), *(x.to(k.dtype) for x in passing.wait())


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, seed, unused = _forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse, seed, unused)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return _backward(dout, *ctx.saved_tensors)


def fa2_ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of this rank's zigzag shard (B, L, H, D), over all ranks."""
    result: Tensor = _Ring.apply(q, k, v)
    return result
