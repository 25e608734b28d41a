"""The ring itself: what one rank computes and exchanges, forward and backward.

Written as generators that yield the tickets they have to wait for, so that one process runs one
rank or all of them. Sums are fp32 (fp64 for fp64) from the first step to the last: (out, lse) stay
in the rank, inside the kernels; dK and dV travel with the keys they belong to, in two groups of
heads, so that one is on its way while the other is computed. The order of all additions is fixed.
Source: Liu et al. 2023 (arXiv 2310.01889), algorithm 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dtypes import stat_dtype
from .keys import (
    KeyRing,
    Memory,
    Rank,
    Wire,
    columns_of,
    heads_of,
    intervals,
    rows_of,
    sums_like,
)  # fmt: skip
from .lanes import Lanes
from .layout import head_groups, home_slot
from .parts import Part, parts_of
from .saved import Saved, SavedInBlocks, ends_as_sum, keys_of, save
from .schedule import Call
from .together import forward_together, own_calls
from .transport import Hop, Steps


def forward(at: Rank, q: Tensor, k: Tensor, v: Tensor) -> Steps[tuple[Tensor, Tensor]]:
    """out (B, L, Hq, Dv) and lse (B, Hq, L) of one rank's queries over the keys of all."""
    (B, L, Hq, _), Dv = q.shape, v.shape[-1]
    out, lse = q.new_empty(B, L, Hq, Dv), q.new_empty(B, Hq, L, dtype=stat_dtype(q.dtype))
    parts = parts_of(at, q, k, v)
    carries = [sums_like(part.queries(out)) for part in parts]
    for part in parts:
        if not part.fills(at):
            part.statistics(lse).fill_(-torch.inf)
    ring = KeyRing(at, "forward kv", Memory(at, k, v), k, v)
    with Lanes(at.transport, len(parts) > 1) as lanes:
        for step in range(at.world_size):
            if 0 < step < at.world_size - 1:
                lanes.join()  # keys are there, and those of the step before no longer read
            ticket, held = ring.post(step), ring.held
            if step == 0 or held is not None:
                for lane, (part, carry) in enumerate(zip(parts, carries, strict=True)):
                    if step > 0 or not (part.own_last or part.two):
                        with lanes.on(lane):
                            _forward_step(at, step, part, q, k, v, held, carry, lse, out)
            for lane in range(len(lanes) if ticket is not None else 0):
                with lanes.on(lane):
                    yield ticket
            ring.turn()
        for lane, (part, carry) in enumerate(zip(parts, carries, strict=True)):
            if part.own_last:
                with lanes.on(lane):
                    _forward_step(at, 0, part, q, k, v, None, carry, lse, out)
    for part, carry in zip(parts, carries, strict=True):
        for begin, end in at.schedule.final_rows(at.rank, part.own_last)[1]:
            part.queries(out)[:, begin:end] = carry[:, begin:end]
    return out, lse


def _forward_step(
    at: Rank, step: int, part: Part, q: Tensor, k: Tensor, v: Tensor, held: Wire | None,
    carry: Tensor, lse: Tensor, out: Tensor,
) -> None:  # fmt: skip
    if part.two is not None and step == 1:
        assert held is not None
        forward_together(
            at, part.two, part.queries(q), part.keys(k), part.keys(v), part.keys(held.k),
            part.keys(held.v), carry, part.statistics(lse), part.queries(out),
        )  # fmt: skip
        return
    source = at.schedule.source(at.rank, step)
    counts = at.schedule.final_rows(at.rank, part.own_last)[0]
    calls: Sequence[Call] = at.schedule.calls[at.rank][source]
    if step > 0:
        assert held is not None
        k, v, calls = held.k, held.v, at.schedule.wire_calls(at.rank, source)
    first = step == part.own_last and part.fills(at)
    _forward_calls(
        at, calls, counts[step], part.queries(q), part.keys(k), part.keys(v), carry,
        part.statistics(lse), part.queries(out), first,
    )  # fmt: skip


def _forward_calls(
    at: Rank, calls: Sequence[Call], counts: Sequence[int], q: Tensor, k: Tensor, v: Tensor,
    carry: Tensor, lse: Tensor, out: Tensor, first: bool,
) -> None:  # fmt: skip
    """Of every call the first `count` rows are done: they are rounded and go to `out`.

    With `first`, every row belongs to one call and carries nothing.
    """
    with Lanes(at.transport, _apart(calls) and len(calls) > 1) as lanes:
        for lane, (call, count) in enumerate(zip(calls, counts, strict=True)):
            q0, q1, k0, k1, causal, window, start = call
            in_kernel = count if q.is_cuda or count == q1 - q0 else 0
            with lanes.on(lane):
                torch.ops.lctx.flash_carry(
                    rows_of(q, q0, q1), rows_of(k, k0, k1), rows_of(v, k0, k1),
                    rows_of(carry, q0, q1), columns_of(lse, q0, q1), causal, at.scale, window, 0,
                    start, False, first, rows_of(out, q0, q1), in_kernel,
                )  # fmt: skip
            if in_kernel < count:
                out[:, q0 : q0 + count] = carry[:, q0 : q0 + count]


def _apart(calls: Sequence[Call]) -> bool:
    """Whether no row has two of the calls."""
    return all(a.q1 <= b.q0 for a, b in itertools.pairwise(calls))


class GradientRing:
    """Sums of dk and dv of one group of heads [h0, h1): two slots that travel with their keys.

    The sum for the keys of a source starts at the first other rank that sees them, follows them
    from rank to rank, and goes home from the last one.
    """

    def __init__(
        self, at: Rank, part: int, heads: tuple[int, int], memory: Memory, dk: Tensor, dv: Tensor
    ) -> None:
        self.at, self.part, self.memory = at, part, memory
        self.h0, self.h1 = heads
        self.dk, self.dv = dk, dv
        self.held: Wire | None = None  # the sum that has arrived for the step to come
        self.arriving: Wire | None = None
        self.home: Wire | None = None
        self.home_is_last = at.schedule.last[at.rank] == at.world_size - 1
        self.ticket: Any = None

    def _slot(self, slot: int, source: int) -> Wire:
        rows = self.at.schedule.wire_rows(source)
        return self.memory.wire(self.memory.own.sums[self.part][slot], rows, self.dk, self.dv)

    def arrive(self) -> Steps[None]:
        """Wait for the hop under way; own gradients that came home are added."""
        if self.ticket is not None:
            yield self.ticket
        self.ticket, self.held, self.arriving = None, self.arriving, None
        if self.home is None or self.home_is_last:
            return
        for own, packed in intervals(self.at.schedule.wire[self.at.rank]):
            self.dk[:, own] += self.home.k[:, packed]
            self.dv[:, own] += self.home.v[:, packed]
        self.home = None

    def finish(self, dk: Tensor, dv: Tensor, row: int, stop: int) -> None:
        """The results for own keys [row, stop) in their dtype, rounded once."""
        wire = self.at.schedule.wire[self.at.rank] if self.home is not None else ()
        for own, packed in intervals(wire):
            begin, end = max(own.start, row), min(own.stop, stop)
            if begin >= end:
                continue
            assert self.home is not None
            shift = packed.start - own.start
            k, v = (rows_of(x, begin + shift, end + shift) for x in (self.home.k, self.home.v))
            sums = rows_of(self.dk, row, end), rows_of(self.dv, row, end)
            _round(*sums, (k, v), begin - row, rows_of(dk, row, end), rows_of(dv, row, end))
            row = end
        if row < stop:
            sums = rows_of(self.dk, row, stop), rows_of(self.dv, row, stop)
            _round(*sums, (None, None), 0, rows_of(dk, row, stop), rows_of(dv, row, stop))

    def sum_of(self, step: int) -> tuple[Wire, bool]:
        """Where the gradients of `step` are added, and whether nothing is there yet."""
        source = self.at.schedule.source(self.at.rank, step)
        empty = self.at.schedule.first[source] == step
        if empty:
            self.held = self._slot(step % 2, source)
            if not self.at.schedule.keys_once(self.at.rank, source):
                self.held.flat.zero_()
                empty = False
        assert self.held is not None
        return self.held, empty

    def post(self, step: int) -> None:
        """Pass the sum of `step` on, or home, and receive that of the next step."""
        at, schedule, n = self.at, self.at.schedule, self.at.world_size
        source, coming = schedule.source(at.rank, step), schedule.source(at.rank, step + 1)
        sends, recvs, places = [], [], []
        if self.held is not None:
            passes = step < schedule.last[source]
            target = at.next if passes else source
            slot = (step + 1) % 2 if passes else home_slot(schedule, source)
            sends.append((target, self.held.flat))
            places.append(self.memory.of(target).sums[self.part][slot])
        if schedule.first[coming] <= step < schedule.last[coming] and step + 1 < n:
            self.arriving = self._slot((step + 1) % 2, coming)
            recvs.append((at.previous, self.arriving.flat))
        if schedule.last[at.rank] == step:
            self.home = self._slot(home_slot(schedule, at.rank), at.rank)
            recvs.append(((at.rank + step) % n, self.home.flat))
        if sends or recvs:
            hop = Hop("backward dkv", step, self.part, tuple(sends), tuple(recvs), tuple(places))
            self.ticket = at.transport.post(hop)


def _round(
    dk: Tensor, dv: Tensor, home: tuple[Tensor | None, Tensor | None], begin: int, dk_out: Tensor,
    dv_out: Tensor,
) -> None:  # fmt: skip
    """Sums, rows from `begin` on with what came home, in the dtype of the results."""
    if dk_out.is_cuda:
        torch.ops.lctx.carry_bwd_keys(dk, dv, *home, begin, dk_out, dv_out)
        return
    for sums, more, out in ((dk, home[0], dk_out), (dv, home[1], dv_out)):
        if more is None:
            out.copy_(sums)
        else:
            out[:, :begin] = sums[:, :begin]
            torch.add(sums[:, begin:], more, out=out[:, begin:])


def backward(
    at: Rank, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor,
) -> Steps[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """dq, dk, dv of one rank's tensors; lse and delta are those over the keys of all ranks."""
    heads, G, rows = k.shape[2], q.shape[2] // k.shape[2], k.shape[1]
    groups = head_groups(at.schedule, heads)
    once = at.schedule.keys_once(at.rank, at.rank) and at.schedule.last[at.rank] in (
        0, at.world_size - 1,
    )  # fmt: skip
    early, late = own_calls(at, q, k, v)
    as_sums = [c for c in (*early, *late) if ends_as_sum(at, c, q)] if once else None
    dk, dv = (sums_like(x, "meta" if as_sums == [] else None) for x in (k, v))
    if not once:
        dk.zero_(), dv.zero_()
    dk_out, dv_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    sums = [(heads_of(dk, *group), heads_of(dv, *group)) for group in groups]
    memory = Memory(at, k, v, sums)
    parts = [GradientRing(at, part, groups[part], memory, *sums[part]) for part in range(len(sums))]
    ring = KeyRing(at, "backward kv", memory, k, v)
    ticket = ring.post(0)
    own = save(at, dout, dlse, q, out, lse)

    def add(call: Call) -> None:
        grads = (dk, dv) if as_sums is None or call in as_sums else (dk_out, dv_out)
        own.add(at, call, k, v, *grads, once)

    for call in early:
        add(call)
    with Lanes(at.transport, once and len(late) > 1) as lanes:
        for step in range(1, at.world_size):
            if ticket is not None:
                for lane in range(len(lanes)):
                    with lanes.on(lane):
                        yield ticket
            ring.turn()
            if step > 1:
                lanes.meet()  # keys of the step before are no longer read
            with lanes.on(0):
                ticket = ring.post(step)
            if step == at.world_size - 1:
                lanes.join()  # own keys come behind these kernels
            for part in parts:
                with lanes.on(part.part):
                    yield from _backward_step(at, step, part, own, ring.held, G, lanes)
        if ticket is not None:
            yield ticket
        if len(late) > 1 and _apart(late) and once:
            with lanes.on(0):
                for lane, call in lanes.deal(late, True, 0):
                    with lanes.on(lane):
                        add(call)
        else:
            if own.fixed:
                lanes.join()
            for call in late:
                add(call)
    for part in parts:
        yield from part.arrive()
        k, v = (heads_of(x, part.h0, part.h1) for x in (dk_out, dv_out))
        for begin, end in [(0, rows)] if as_sums is None else keys_of(as_sums):
            part.finish(k, v, begin, end)
    return own.result(at), dk_out, dv_out


def _backward_step(
    at: Rank, step: int, part: GradientRing, own: Saved | SavedInBlocks, held: Wire | None, G: int,
    lanes: Lanes,
) -> Steps[None]:  # fmt: skip
    """Add the gradients of one group of heads to the sums that arrive, and pass them on."""
    yield from part.arrive()
    source = at.schedule.source(at.rank, step)
    if at.schedule.first[source] <= step <= at.schedule.last[source]:
        assert held is not None
        calls = at.schedule.wire_calls(at.rank, source)
        all_heads = part.h1 - part.h0 == held.k.shape[2]
        spread = all_heads and _apart(calls) and at.schedule.keys_once(at.rank, source)
        total, empty = part.sum_of(step)
        mine = own.heads(part.h0 * G, part.h1 * G)
        k, v = heads_of(held.k, part.h0, part.h1), heads_of(held.v, part.h0, part.h1)
        for lane, call in lanes.deal(calls, spread, part.part):
            with lanes.on(lane):
                mine.add(at, call, k, v, total.k, total.v, empty)
    part.post(step)
