"""What the backward of a rank works on in all steps, and what it does with the keys of one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .keys import Rank, columns_of, cut, heads_of, rows_of, sums_like
from .schedule import Call


class Saved(NamedTuple):
    """What the backward of one rank works on."""

    dout: Tensor
    q: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor

    @property
    def fixed(self) -> bool:
        """Whether calls with rows in common have to run one after the other."""
        return True

    def heads(self, begin: int, end: int) -> Saved:
        """Query heads [begin, end)."""
        dout, q, lse, delta, dq = self
        lse, delta = cut(lse, 1, begin, end), cut(delta, 1, begin, end)
        dout, q, dq = (heads_of(x, begin, end) for x in (dout, q, dq))
        return Saved(dout, q, lse, delta, dq)

    def add(
        self, at: Rank, call: Call, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, first: bool
    ) -> None:
        """Add the gradients of one call; with `first`, nothing is in dk and dv yet."""
        q0, q1, k0, k1, causal, window, start = call
        torch.ops.lctx.flash_carry_bwd(
            rows_of(self.dout, q0, q1), rows_of(self.q, q0, q1), rows_of(k, k0, k1),
            rows_of(v, k0, k1), columns_of(self.lse, q0, q1), columns_of(self.delta, q0, q1),
            rows_of(self.dq, q0, q1), rows_of(dk, k0, k1), rows_of(dv, k0, k1), causal, at.scale,
            window, 0, start, at.deterministic, first,
        )  # fmt: skip

    def result(self, at: Rank) -> Tensor:
        """dq of all calls."""
        return self.dq.to(self.q.dtype)


class SavedInBlocks(NamedTuple):
    """The same on a GPU: made once for all calls, in blocks, where there is such a kernel.

    With `fixed`, calls with rows in common have to run one after the other.
    """

    dout: Tensor
    q: Tensor
    rows: Tensor
    dq_sum: Tensor
    fixed: bool
    first_head: int = 0

    @staticmethod
    def fits(q: Tensor) -> bool:
        """Whether there is such a kernel."""
        return q.is_cuda and q.shape[-1] <= 128

    def heads(self, begin: int, end: int) -> SavedInBlocks:
        """Query heads [begin, end)."""
        if end - begin == self.q.shape[2]:
            return self
        dout, q = heads_of(self.dout, begin, end), heads_of(self.q, begin, end)
        return self._replace(dout=dout, q=q, first_head=self.first_head + begin)

    def add(
        self, at: Rank, call: Call, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, first: bool
    ) -> None:
        """As `Saved.add`; rows of the call's first block that are in front of it take no part.

        With `first`, and in the dtype of k, dk and dv are the results.
        """
        q0, q1, k0, k1, causal, window, start = call
        front = q0 % (128 if self.q.shape[-1] <= 64 else 80 if self.fixed else 64)
        torch.ops.lctx.carry_bwd_step(
            rows_of(self.dout, q0 - front, q1), rows_of(self.q, q0 - front, q1),
            rows_of(k, k0, k1), rows_of(v, k0, k1), self.rows, self.dq_sum, rows_of(dk, k0, k1),
            rows_of(dv, k0, k1), causal, at.scale, window, 0, start + front, q0 - front,
            self.first_head, first, front, self.fixed,
        )  # fmt: skip

    def result(self, at: Rank) -> Tensor:
        """dq of all calls."""
        dq: Tensor = torch.ops.lctx.carry_bwd_end(self.dq_sum, self.q, at.scale, self.fixed)
        return dq


def save(
    at: Rank, dout: Tensor, dlse: Tensor | None, q: Tensor, out: Tensor, lse: Tensor
) -> Saved | SavedInBlocks:
    """What all steps share, and a sum of dq with nothing in it."""
    if SavedInBlocks.fits(q):
        fixed = at.deterministic
        rows, dq_sum = torch.ops.lctx.carry_bwd_begin(dout, dlse, out, lse, fixed)
        return SavedInBlocks(dout, q, rows, dq_sum, fixed)
    delta = torch.ops.lctx.attn_delta(dout, dlse, out)
    return Saved(dout, q, lse, delta, sums_like(q).zero_())


def ends_as_sum(at: Rank, call: Call, q: Tensor) -> bool:
    """Whether gradients of the own keys of a call, which no other one has, are not results yet."""
    comes_home = any(begin < call.k1 and call.k0 < end for begin, end in at.schedule.wire[at.rank])
    return comes_home or not SavedInBlocks.fits(q)


def keys_of(calls: Iterable[Call]) -> list[tuple[int, int]]:
    """The keys of calls that have none in common, [begin, end) each, as few as can be."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted((call.k0, call.k1) for call in calls):
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined
