"""What a rank holds of a ring: its place in it, its memory, and the keys, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._dtypes import stat_dtype
from .layout import Layout, layout_of, memory_of
from .schedule import Schedule
from .transport import Hop, Transport

MOST_SHAPES = 256  # that an answer is kept for
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


Found = TypeVar("Found")


def of_shapes(
    function: Callable[[Rank, Tensor, Tensor, Tensor], Found],
) -> Callable[[Rank, Tensor, Tensor, Tensor], Found]:
    """`function(at, q, k, v)`, which reads schedule, rank, shapes and dtype, once for each."""
    known: dict[tuple[Any, ...], Found] = {}
    _KNOWN.append(known)

    @functools.wraps(function)
    def remembered(at: Rank, q: Tensor, k: Tensor, v: Tensor) -> Found:
        key = (at.schedule, at.rank, q.shape, k.shape, v.shape, q.dtype, q.device.type)
        if key not in known:
            if len(known) >= MOST_SHAPES:
                known.clear()
            known[key] = function(at, q, k, v)
        return known[key]

    return remembered


def forget_shapes() -> None:
    """Find everything anew that `of_shapes` remembers."""
    for known in _KNOWN:
        known.clear()


_KNOWN: list[dict[tuple[Any, ...], Any]] = []


def cut(x: Tensor, dim: int, begin: int, end: int) -> Tensor:
    """[begin, end) of a dimension; x itself where that is all."""
    return x if end - begin == x.shape[dim] else x.narrow(dim, begin, end - begin)


def rows_of(x: Tensor, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of (B, L, H, D)."""
    return cut(x, 1, begin, end)


def columns_of(x: Tensor, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of statistics (B, H, L)."""
    return cut(x, 2, begin, end)


def heads_of(x: Tensor, begin: int, end: int) -> Tensor:
    """Heads [begin, end) of (B, L, H, D)."""
    return cut(x, 2, begin, end)


def sums_like(x: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Room for sums of x: in fp32, in fp64 for fp64."""
    dtype = stat_dtype(x.dtype)
    return torch.empty_like(x, dtype=dtype, device=device, memory_format=torch.contiguous_format)


def _row_size(k: Tensor, v: Tensor) -> int:
    """Elements of one row of k and of v."""
    (B, _, H, Dk), Dv = k.shape, v.shape[3]
    return B * H * (Dk + Dv)


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
        self._views: dict[torch.dtype, Tensor] = {}

    def of(self, rank: int) -> Layout:
        """The layout of `rank`'s memory."""
        return layout_of(self.at.schedule, rank, *self.sizes)

    def wire(self, offset: int, rows: int, k: Tensor, v: Tensor) -> Wire:
        """Views at `offset` for `rows` rows shaped like those of k and v."""
        (B, _, H, Dk), Dv = k.shape, v.shape[3]
        whole, row, parts = self._whole(k.dtype), B * rows * H, []
        begin = whole.storage_offset() + offset // k.element_size()
        for D in (Dk, Dv):
            parts.append(whole.as_strided((B, rows, H, D), (rows * H * D, H * D, D, 1), begin))
            begin += row * D
        size = row * (Dk + Dv)
        return Wire(whole.as_strided((size,), (1,), begin - size), *parts)

    def _whole(self, dtype: torch.dtype) -> Tensor:
        """All of it in a dtype; a call has two, of keys and of sums."""
        found = self._views.get(dtype)
        if found is None:
            found = self._views[dtype] = self.bytes.view(dtype)
        return found


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
        if self.at.transport.gathers and 2 * len(rows) <= MOST_PIECES:
            pieces = [rows_of(x, i.start, i.stop) for x in (self.k, self.v) for i, _ in rows]
            if all(x.is_contiguous() for x in pieces):
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
