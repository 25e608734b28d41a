"""What a rank holds of a ring: its place in it, its memory, and the keys, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Layout, layout_of, memory_of
from .schedule import Schedule
from .transport import Hop, Transport

MOST_PIECES = 8  # of a message that is not packed


class Rank(NamedTuple):
    """One rank's view of a ring."""

    rank: int
    schedule: Schedule
    transport: Transport
    scale: float
    deterministic: bool = True

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.schedule.plan.world_size

    @property
    def next(self) -> int:
        """Where keys go."""
        return (self.rank + 1) % self.world_size

    @property
    def previous(self) -> int:
        """Where keys come from."""
        return (self.rank - 1) % self.world_size


class Wire(NamedTuple):
    """A flat buffer that holds the travelling rows of k and v, or of dk and dv."""

    flat: Tensor
    k: Tensor
    v: Tensor


def _row_size(k: Tensor, v: Tensor) -> int:
    """Elements of one row of k and of v."""
    return k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3])


class Memory:
    """A rank's part of the memory that hops read and write, and the layout of every rank's."""

    def __init__(self, at: Rank, k: Tensor, v: Tensor, sums: Sequence[tuple[Tensor, Tensor]] = ()):
        self.at = at
        self.sizes = (
            _row_size(k, v) * k.element_size(),
            tuple(_row_size(dk, dv) * dk.element_size() for dk, dv in sums),
        )
        size = memory_of(at.schedule, *self.sizes)
        self.bytes = at.transport.memory(size, k.device) if size else k.new_empty(0).view(-1)
        self.own = self.of(at.rank)

    def of(self, rank: int) -> Layout:
        """The layout of `rank`'s memory."""
        return layout_of(self.at.schedule, rank, *self.sizes)

    def wire(self, offset: int, rows: int, k: Tensor, v: Tensor) -> Wire:
        """Views at `offset` for `rows` rows shaped like those of k and v."""
        shapes = [(x.shape[0], rows, *x.shape[2:]) for x in (k, v)]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        end = offset + sum(sizes) * k.element_size()
        flat = self.bytes[offset:end].view(k.dtype)
        parts = flat.split(sizes)
        return Wire(flat, *(p.view(s) for p, s in zip(parts, shapes, strict=True)))


def intervals(wire: Iterable[tuple[int, int]]) -> list[tuple[slice, slice]]:
    """Rows of the source and where they stand on the wire."""
    pairs, row = [], 0
    for begin, end in wire:
        pairs.append((slice(begin, end), slice(row, row + end - begin)))
        row += end - begin
    return pairs


class KeyRing:
    """The keys and values that a rank holds, step by step: two slots and the packed own rows."""

    def __init__(self, at: Rank, phase: str, memory: Memory, k: Tensor, v: Tensor) -> None:
        self.at, self.phase, self.memory, self.k, self.v = at, phase, memory, k, v
        self.held: Wire | None = None
        self.pieces: tuple[Tensor, ...] = ()
        if at.schedule.last[at.rank] > 0:
            self.held = memory.wire(memory.own.own, at.schedule.wire_rows(at.rank), k, v)
            self._pack(self.held)
        self.arriving: Wire | None = None

    def _pack(self, wire: Wire) -> None:
        """Own rows side by side, unless the transport takes them from where they are."""
        rows = intervals(self.at.schedule.wire[self.at.rank])
        pieces = [x[:, own] for x in (self.k, self.v) for own, _ in rows]
        apart = self.at.transport.gathers and len(pieces) <= MOST_PIECES
        if apart and all(x.is_contiguous() for x in pieces):
            self.pieces = tuple(pieces)
            return
        for own, packed in rows:
            wire.k[:, packed] = self.k[:, own]
            wire.v[:, packed] = self.v[:, own]

    def _place(self, rank: int, step: int) -> int:
        """Where keys lie that arrive at `rank` in `step`."""
        slots = self.memory.of(rank).keys
        return slots[step % len(slots)]

    def post(self, step: int) -> Any:
        """Send on what is held in `step` and receive what the next step needs; its ticket."""
        at, schedule = self.at, self.at.schedule
        sends: tuple[tuple[int, Tensor], ...] = ()
        recvs: tuple[tuple[int, Tensor], ...] = ()
        places: tuple[int, ...] = ()
        coming = schedule.source(at.rank, step + 1)
        if self.held is not None and schedule.last[schedule.source(at.rank, step)] > step:
            sends = ((at.next, self.held.flat),)
            places = (self._place(at.next, step + 1),)
        self.arriving = None
        if schedule.last[coming] > step and step + 1 < at.world_size:
            rows = schedule.wire_rows(coming)
            place = self._place(at.rank, step + 1)
            self.arriving = self.memory.wire(place, rows, self.k, self.v)
            recvs = ((at.previous, self.arriving.flat),)
        if not sends and not recvs:
            return None
        pieces = self.pieces if step == 0 else ()
        return at.transport.post(Hop(self.phase, step, 0, sends, recvs, places, pieces))

    def turn(self) -> None:
        """What has arrived is held now."""
        self.held = self.arriving
