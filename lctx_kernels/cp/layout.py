"""Where the buffers that travel lie in a rank's memory: the same answer on every rank.

A rank that sends writes to its peer's memory, so that it must know where the peer expects what.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .schedule import Schedule

ALIGNMENT = 256  # bytes


class Layout(NamedTuple):
    """Offsets in bytes.

    Attributes:
        keys: Slots for passing keys and values: what arrives in step t lies in
            keys[t % len(keys)].
        own: The rank's own packed keys and values.
        sums: Per group of heads the slots for sums of dk, dv: those of step t lie in slot t % 2;
            a third one takes own sums that come home while others pass.
        size: Bytes of everything.
    """

    keys: tuple[int, ...]
    own: int
    sums: tuple[tuple[int, ...], ...]
    size: int


def head_groups(schedule: Schedule, heads: int) -> list[tuple[int, int]]:
    """Key/value heads [begin, end) whose gradients travel together.

    Where sums pass through ranks there are two groups: one is on its way while the other is
    computed. Where they go straight home, the last own blocks are computed meanwhile.
    """
    passes = any(f < last for f, last in zip(schedule.first, schedule.last, strict=True))
    half = (heads + 1) // 2
    return [(0, half), (half, heads)] if heads > 1 and passes else [(0, heads)]


def passing_rows(schedule: Schedule, rank: int) -> list[int]:
    """Rows of the keys that come to `rank`, in the order of the steps."""
    sources = [(schedule.source(rank, step), step) for step in range(1, schedule.plan.world_size)]
    return [schedule.wire_rows(s) for s, step in sources if schedule.last[s] >= step]


def sum_rows(schedule: Schedule, rank: int) -> int:
    """Rows of the largest sum of gradients that passes `rank`, or comes home."""
    return max(schedule.wire_rows(source) for source in range(schedule.plan.world_size))


def home_slot(schedule: Schedule, rank: int) -> int:
    """The slot in which the sums of `rank`'s own keys come home."""
    step = schedule.last[rank]
    coming = schedule.source(rank, step + 1)
    passes = schedule.first[coming] <= step < schedule.last[coming]
    return 2 if passes and step + 1 < schedule.plan.world_size else (step + 1) % 2


@functools.lru_cache(maxsize=4096)
def layout_of(
    schedule: Schedule, rank: int, key_bytes: int, sum_bytes: tuple[int, ...] = ()
) -> Layout:
    """The memory of `rank`.

    Args:
        schedule: Of the ring.
        rank: Whose memory.
        key_bytes: Bytes of a row of k and v.
        sum_bytes: Per group of heads, bytes of a row of the sums of dk and dv; () forward.
    """
    end = 0

    def take(size: int) -> int:
        nonlocal end
        begin = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
        return begin

    if schedule.plan.world_size == 1:
        return Layout((), 0, tuple(() for _ in sum_bytes), 0)
    passing = passing_rows(schedule, rank)
    keys = tuple(take(max(passing) * key_bytes) for _ in passing[:2])
    own = take(schedule.wire_rows(rank) * key_bytes)
    rows, slots = sum_rows(schedule, rank), max(2, home_slot(schedule, rank) + 1)
    sums = tuple(tuple(take(rows * size) for _ in range(slots)) for size in sum_bytes)
    return Layout(keys, own, sums, end)


@functools.lru_cache(maxsize=4096)
def memory_of(schedule: Schedule, key_bytes: int, sum_bytes: tuple[int, ...] = ()) -> int:
    """Bytes that the memory of every rank needs."""
    ranks = range(schedule.plan.world_size)
    return max(layout_of(schedule, rank, key_bytes, sum_bytes).size for rank in ranks)
