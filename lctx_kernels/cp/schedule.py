"""What a ring over a plan computes and sends: the calls of every step, the rows on the wire."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .plan import Plan, Run


class Call(NamedTuple):
    """One kernel call: rows [q0, q1), at positions 0, 1, ..., against keys [k0, k1), at start, ....

    The options are those of `lctx::flash_carry`: causal sees keys up to the row's own position,
    window > 0 limits how far back. Neither: every row sees every key.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    window: int = 0
    start: int = 0

    @property
    def pairs(self) -> int:
        """Number of (row, key) pairs that see each other."""
        rows, keys = self.q1 - self.q0, self.k1 - self.k0
        if not self.causal:
            return rows * keys
        visible = _pairs_from(rows, keys, self.start)
        return visible - (_pairs_from(rows, keys, self.start + self.window) if self.window else 0)


def _ramp(length: int, cap: int) -> int:
    """Sum of min(t, cap) over t = 1, ..., length."""
    if length <= 0:
        return 0
    rising = min(length, cap)
    return rising * (rising + 1) // 2 + (length - rising) * cap


def _pairs_from(rows: int, keys: int, least: int) -> int:
    """Number of (i, j) with i - j >= least."""
    return _ramp(rows - least, keys) - _ramp(-least, keys)


def _call(q: Run, k: Run, stride: int, causal: bool, window: int) -> Call | None:
    """Rows of `q` against keys of `k`, cut to those that see or are seen; None where none are.

    Row i and key j are delta + stride (i - j) positions apart, so that every mask is a band of
    i - j.
    """
    delta = q.start - k.start
    low, high = -(k.length - 1), q.length - 1  # of i - j
    if causal or window:
        nearest = 0 if causal else 1 - window
        low = max(low, -((delta - nearest) // stride))
    if window:
        high = min(high, (window - 1 - delta) // stride)
    i0, i1 = max(0, low), min(q.length, k.length + high)
    j0, j1 = max(0, -high), min(k.length, q.length - low)
    if low > high or i0 >= i1 or j0 >= j1:
        return None
    low, high = low + j0 - i0, high + j0 - i0  # of rows and keys counted from i0 and j0
    rows = (q.row + i0, q.row + i1, k.row + j0, k.row + j1)
    limited_low, limited_high = low > j0 + 1 - j1, high < i1 - i0 - 1
    if limited_high:
        return Call(*rows, True, high - low + 1, low)
    return Call(*rows, True, 0, low) if limited_low else Call(*rows)


def _local_triangles(runs: Sequence[Run], stride: int) -> list[Call] | None:
    """One causal call per document, where its rows are consecutive and in order."""
    calls: list[Call] = []
    for before, run in zip([None, *runs], runs, strict=False):
        if before is None or run.document != before.document:
            calls.append(Call(run.row, run.row + run.length, run.row, run.row + run.length, True))
        elif run.start <= before.start + (before.length - 1) * stride:
            return None
        else:
            end = run.row + run.length
            calls[-1] = calls[-1]._replace(q1=end, k1=end)
    if len({run.document for run in runs}) != len(calls):
        return None
    return calls


def _join(a: Call, b: Call) -> Call | None:
    """Both as one call, where they have no mask, share rows or keys, and are neighbours."""
    if a.causal or b.causal:
        return None
    if a[:2] == b[:2] and a.k1 == b.k0:
        return a._replace(k1=b.k1)
    if a[2:4] == b[2:4] and a.q1 == b.q0:
        return a._replace(q1=b.q1)
    return None


def _joined(calls: Iterable[Call]) -> list[Call]:
    """The calls in their order, each joined with those before it as far as that goes."""
    joined: list[Call] = []
    for call in calls:
        while joined and (both := _join(joined[-1], call)) is not None:
            joined.pop()
            call = both
        joined.append(call)
    return joined


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of a ring under one mask; step t of rank r works on the keys of rank r - t.

    Attributes:
        calls: Per rank and source rank, the calls, with keys counted in the rows of the source.
        wire: Per source rank, the rows [begin, end) of its keys that any other rank needs.
        first, last: Per source rank, the first and last step in which another rank needs them;
            (0, 0) where none does. The keys make `last` hops.
    """

    plan: Plan
    causal: bool
    window: int
    calls: tuple[tuple[tuple[Call, ...], ...], ...]
    wire: tuple[tuple[tuple[int, int], ...], ...]
    first: tuple[int, ...]
    last: tuple[int, ...]

    def source(self, rank: int, step: int) -> int:
        """Whose keys `rank` works on in `step`."""
        return (rank - step) % self.plan.world_size

    def wire_rows(self, source: int) -> int:
        """Rows that leave `source`."""
        return self._wire_lengths[source]

    @functools.cached_property
    def _wire_lengths(self) -> tuple[int, ...]:
        return tuple(sum(end - begin for begin, end in rows) for rows in self.wire)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - schedules are few and kept anyway
    def wire_calls(self, rank: int, source: int) -> list[Call]:
        """The calls with keys counted in the rows that travel."""
        begins = [begin for begin, _ in self.wire[source]]
        lengths = [end - begin for begin, end in self.wire[source]]
        shifts = [s - b for s, b in zip(itertools.accumulate([0, *lengths]), begins, strict=False)]
        calls = []
        for call in self.calls[rank][source]:
            by = shifts[bisect.bisect_right(begins, call.k0) - 1]
            calls.append(call._replace(k0=call.k0 + by, k1=call.k1 + by))
        return calls

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def step_fills(self, rank: int, step: int) -> bool:
        """Whether the calls of `step` have every row of `rank` exactly once."""
        edges = ((call.q0, call.q1) for call in self.calls[rank][self.source(rank, step)])
        return _tile(edges, self.plan.lengths[rank])

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def final_rows(
        self, rank: int, own_last: bool = False
    ) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Per step and call, how many of its first rows no later call has; the rows left over.

        Every row is among the first ones of the last call that has it, or left over. With
        `own_last` step 0 comes behind all others.
        """
        n = self.plan.world_size
        steps = [*range(1, n), 0] if own_last else range(n)
        order = [
            (step, call) for step in steps for call in self.calls[rank][self.source(rank, step)]
        ]
        edges = sorted({0, self.plan.lengths[rank], *(e for _, c in order for e in (c.q0, c.q1))})
        last = [-1] * len(edges)  # the last call that has rows from an edge to the next
        for index, (_, call) in enumerate(order):
            for at in range(bisect.bisect_left(edges, call.q0), bisect.bisect_left(edges, call.q1)):
                last[at] = index
        counts: list[list[int]] = [[] for _ in range(n)]
        for index, (step, call) in enumerate(order):
            at = bisect.bisect_left(edges, call.q0)
            while last[at] == index:
                last[at] = -2
                at += 1
            counts[step].append(edges[at] - call.q0)
        spans = zip(edges, edges[1:], last, strict=False)
        return counts, [(begin, end) for begin, end, owner in spans if owner != -2]

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def keys_once(self, rank: int, source: int) -> bool:
        """Whether the calls of `rank` have all keys of `source` that are there exactly once."""
        if rank == source:
            calls: Sequence[Call] = self.calls[rank][rank]
            return _tile(((call.k0, call.k1) for call in calls), self.plan.lengths[rank])
        calls = self.wire_calls(rank, source)
        return _tile(((call.k0, call.k1) for call in calls), self.wire_rows(source))

    def pairs(self, rank: int, source: int) -> int:
        """(query, key) pairs that `rank` computes on the keys of `source`."""
        return sum(call.pairs for call in self.calls[rank][source])


def _pair_calls(plan: Plan, rank: int, source: int, causal: bool, window: int) -> list[Call]:
    by_document: dict[int, list[Run]] = {}
    for run in plan.runs[source]:
        by_document.setdefault(run.document, []).append(run)
    calls = []
    for q in plan.runs[rank]:
        for k in by_document.get(q.document, ()):
            call = _call(q, k, plan.stride, causal, window)
            if call is not None:
                calls.append(call)
    return calls


def _calls(plan: Plan, rank: int, source: int, causal: bool, window: int) -> tuple[Call, ...]:
    if rank == source and causal and not window:
        triangles = _local_triangles(plan.runs[rank], plan.stride)
        if triangles is not None:
            return tuple(triangles)
    return tuple(_joined(_pair_calls(plan, rank, source, causal, window)))


def _union(intervals: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)


def _tile(intervals: Iterable[tuple[int, int]], length: int) -> bool:
    """Whether the intervals have every number below `length` exactly once."""
    edges = sorted(intervals)
    ends = [0, *(end for _, end in edges)]
    return [begin for begin, _ in edges] == ends[:-1] and ends[-1] == length


@functools.lru_cache(maxsize=256)
def schedule_of(plan: Plan, causal: bool, window: int) -> Schedule:
    """What a ring over `plan` computes and sends under a mask; window = 0: none."""
    n = plan.world_size
    calls = tuple(
        tuple(_calls(plan, rank, source, causal, window) for source in range(n))
        for rank in range(n)
    )
    wire, first, last = [], [], []
    for source in range(n):
        steps = [t for t in range(1, n) if calls[(source + t) % n][source]]
        first.append(steps[0] if steps else 0)
        last.append(steps[-1] if steps else 0)
        needed = (calls[(source + t) % n][source] for t in steps)
        wire.append(_union((call.k0, call.k1) for group in needed for call in group))
    return Schedule(plan, causal, window, calls, tuple(wire), tuple(first), tuple(last))
