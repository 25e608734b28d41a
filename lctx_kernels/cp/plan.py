"""Plans: which positions of a sequence each rank holds, in which order."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST = 2**62  # tokens of a sequence
LAYOUTS = ("zigzag", "striped", "contiguous")


class Run(NamedTuple):
    """Consecutive rows of a rank at positions start, start + stride, ... of one document."""

    row: int
    length: int
    start: int
    document: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Which positions of a sequence each rank holds, in which order. Made by `make_plan`.

    Attributes:
        seq_len: Tokens of the whole sequence.
        world_size: Ranks.
        layout: "zigzag", "striped", "contiguous" or "positions".
        ranges: Per rank its positions as arithmetic progressions, in the order of its rows.
        documents: Starts of packed documents and seq_len; (0, seq_len) without documents.
        spec: Everything above as text: plans are equal if and only if it is.
        lengths: Tokens of each rank.
        stride: Step of all progressions: world_size for "striped", else 1.

    >>> from lctx_kernels import cp
    >>> plan = cp.make_plan(10, 2)
    >>> plan.lengths, cp.shard_positions(plan, 1).tolist()
    ((5, 5), [2, 3, 4, 5, 6])
    """

    seq_len: int
    world_size: int
    layout: str
    ranges: tuple[tuple[range, ...], ...]
    documents: tuple[int, ...]
    spec: str = field(repr=False)
    lengths: tuple[int, ...] = field(init=False)
    stride: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = tuple(sum(map(len, ranges)) for ranges in self.ranges)
        object.__setattr__(self, "lengths", lengths)
        steps = {r.step for ranges in self.ranges for r in ranges if len(r) > 1}
        object.__setattr__(self, "stride", steps.pop() if steps else 1)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return plan_of, (self.spec,)

    @functools.cached_property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """Per rank its rows, cut where positions jump and where documents begin."""
        return tuple(tuple(self._runs(ranges)) for ranges in self.ranges)

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(seq_len,) int64 each: the rank that holds a position, and its row there."""
        owner = torch.empty(self.seq_len, dtype=torch.int64, device="cpu")
        row = torch.empty(self.seq_len, dtype=torch.int64, device="cpu")
        for rank, ranges in enumerate(self.ranges):
            first = 0
            for r in ranges:
                owner[r.start : r.stop : r.step] = rank
                row[r.start : r.stop : r.step] = torch.arange(first, first + len(r), device="cpu")
                first += len(r)
        return owner, row

    def _runs(self, ranges: Sequence[range]) -> list[Run]:
        runs, row = [], 0
        for positions in ranges:
            document = _document_of(self.documents, positions.start)
            while positions:
                end = self.documents[document + 1]
                count = len(range(positions.start, min(end, positions.stop), positions.step))
                if count:
                    runs.append(Run(row, count, positions.start, document))
                row, positions, document = row + count, positions[count:], document + 1
        return runs

    def with_documents(self, bounds: Sequence[int]) -> Plan:
        """The same rows with documents that start at `bounds`, which ends with seq_len."""
        ranges = [[[r.start, r.stop, r.step] for r in held] for held in self.ranges]
        return plan_of(_spec("positions", self.seq_len, self.world_size, bounds, ranges))


def _document_of(documents: Sequence[int], position: int) -> int:
    low, high = 0, len(documents) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if documents[middle] <= position else (low, middle)
    return low


def _merged(ranges: Sequence[range]) -> tuple[range, ...]:
    """Without empty ranges, and neighbours that continue each other as one."""
    merged: list[range] = []
    for r in ranges:
        if merged and r and r.step == merged[-1].step == 1 and merged[-1].stop == r.start:
            merged[-1] = range(merged[-1].start, r.stop)
        elif r:
            merged.append(r)
    return tuple(merged)


def _chunks(begin: int, end: int, pieces: int) -> list[range]:
    edges = [begin + (end - begin) * i // pieces for i in range(pieces + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def _layout_ranges(
    layout: str, seq_len: int, n: int, documents: Sequence[int]
) -> tuple[tuple[range, ...], ...]:
    if layout == "striped":
        return tuple(_merged([range(rank, seq_len, n)]) for rank in range(n))
    if layout == "contiguous":
        return tuple(_merged([chunk]) for chunk in _chunks(0, seq_len, n))
    held: list[list[range]] = [[] for _ in range(n)]
    for document, (begin, end) in enumerate(itertools.pairwise(documents)):
        chunks = _chunks(begin, end, 2 * n)
        for rank in range(n):  # turned from document to document: odd tokens fall to all ranks
            own = (rank + document) % n
            held[rank] += [chunks[own], chunks[-1 - own]]
    return tuple(_merged(ranges) for ranges in held)


def _spec(
    layout: str,
    seq_len: int,
    world_size: int,
    documents: Sequence[int] | None,
    ranges: Sequence[Sequence[Sequence[int]]] | None = None,
) -> str:
    if documents is None and ranges is None:  # by a format that torch.compile can follow
        return f'["{layout}",{seq_len},{world_size},null,null]'
    bounds = [0, *(documents or ()), seq_len]  # without empty documents
    unique = [b for b, after in itertools.pairwise([*bounds, -1]) if b != after]
    kept = unique if len(unique) > 2 else None
    return json.dumps([layout, seq_len, world_size, kept, ranges], separators=(",", ":"))


@functools.lru_cache(maxsize=512)
def plan_of(spec: str) -> Plan:
    """The plan that `spec` (of a plan) describes."""
    layout, seq_len, world_size, documents, ranges = json.loads(spec)
    if ranges is None:
        held = _layout_ranges(layout, seq_len, world_size, documents or (0, seq_len))
    else:
        held = tuple(tuple(range(*bounds) for bounds in rank) for rank in ranges)
    return Plan(seq_len, world_size, layout, held, tuple(documents or (0, seq_len)), spec)


def _progressions(positions: Sequence[int], step: int) -> list[list[int]]:
    """[start, stop, step] of the longest runs of `positions` that advance by `step`."""
    cuts = [i for i in range(1, len(positions)) if positions[i - 1] + step != positions[i]]
    edges = [0, *cuts, len(positions)] if positions else []
    return [[positions[a], positions[b - 1] + 1, step] for a, b in itertools.pairwise(edges)]


def _ranges_of(positions: list[list[int]]) -> list[list[list[int]]]:
    steps = {b - a for rank in positions for a, b in itertools.pairwise(rank)}
    step = steps.pop() if len(steps) == 1 else 1
    return [_progressions(rank, step if step > 0 else 1) for rank in positions]


def _int(name: str, value: object, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"make_plan: {name} is {value!r}; expected an int >= {minimum}")
    if value < minimum:
        raise ValueError(
            f"make_plan: {name} is {value}; expected an int >= {minimum}; nearest is {minimum}"
        )
    if value > LARGEST:
        raise ValueError(f"make_plan: {name} is {value}; expected an int of at most {LARGEST}")
    return value


def _positions(positions: object) -> list[list[int]]:
    """Those of each rank as a list; raises TypeError where they are not integers."""
    expected = "expected one entry a rank, a 1-D int64 tensor or a sequence of ints"
    given = positions.tolist() if isinstance(positions, Tensor) else positions
    if not isinstance(given, Sequence):
        raise TypeError(f"make_plan: positions is a {type(positions).__name__}; {expected}")
    held = [p.tolist() if isinstance(p, Tensor) else p for p in given]
    for rank, values in enumerate(held):
        if not isinstance(values, Sequence):
            text = f"positions[{rank}] is {values!r:.80}"
        elif any(type(value) is not int for value in values):
            wrong = next(value for value in values if type(value) is not int)
            text = f"positions[{rank}] holds {wrong!r:.80}"
        else:
            continue
        raise TypeError(f"make_plan: {text}; {expected}")
    return [list(values) for values in held]


def document_bounds(cu_seqlens: Tensor, seq_len: int, who: str) -> list[int]:
    """The starts of documents as a list; raises unless they run from 0 to seq_len.

    Raises:
        TypeError: Not an int32 tensor.
        ValueError: Not one-dimensional, or not from 0 to seq_len without decreasing.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        given = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else repr(cu_seqlens)
        raise TypeError(f"{who}: cu_seqlens is {given}; expected an int32 tensor or None")
    bounds: list[int] = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    if not bounds or bounds[0] != 0 or bounds[-1] != seq_len or bounds != sorted(bounds):
        shown = bounds if len(bounds) <= 8 else f"[{bounds[0]}, ..., {bounds[-1]}]"
        raise ValueError(
            f"{who}: cu_seqlens is {shown}, shape {tuple(cu_seqlens.shape)}; expected (documents "
            f"+ 1,) starts of documents from 0 to the sequence's length {seq_len}, not decreasing"
        )
    return bounds


def make_plan(
    seq_len: int,
    world_size: int,
    *,
    layout: str = "zigzag",
    cu_seqlens: Tensor | None = None,
    positions: Sequence[Tensor] | None = None,
) -> Plan:
    """Plan for `seq_len` tokens (any number) over `world_size` ranks.

    Args:
        seq_len: Tokens of the whole sequence, any number: ranks may hold different numbers of them,
            some none.
        world_size: Ranks.
        layout: "zigzag" gives rank r the chunks r and 2 world_size - 1 - r of 2 world_size, of each
            document, which balances causal attention; "contiguous" the chunk r of world_size of the
            whole sequence; "striped" the positions r, r + world_size, .... Ignored with
            `positions`.
        cu_seqlens: (documents + 1,) int32, starts of packed documents and seq_len: documents do not
            see each other, and may lie on several ranks.
        positions: Per rank the (L,) int64 positions of its tokens in any order, every position on
            exactly one rank. Exact for any choice; fast where they form few progressions.

    Returns:
        The plan; the same object for the same arguments.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A value out of range, or positions that are not a permutation.

    Source: Liu et al. 2023 (arXiv 2310.01889), section 3; striped: Brandon et al. 2023
    (arXiv 2311.09431), section 3.

    >>> from lctx_kernels import cp
    >>> cp.make_plan(1000, 4).lengths
    (250, 250, 250, 250)
    >>> cp.make_plan(3, 4, layout="contiguous").lengths  # shorter than the number of ranks
    (0, 1, 1, 1)
    """
    seq_len, world_size = _int("seq_len", seq_len, 0), _int("world_size", world_size, 1)
    bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, seq_len, "make_plan")
    if positions is None:
        if layout not in LAYOUTS:
            raise ValueError(
                f"make_plan: layout is {layout!r}; expected one of {', '.join(LAYOUTS)}, or "
                "positions=[...] for any other"
            )
        return plan_of(_spec(layout, seq_len, world_size, bounds))
    held = _positions(positions)
    if len(held) != world_size or sorted(itertools.chain(*held)) != list(range(seq_len)):
        raise ValueError(
            f"make_plan: positions has {len(held)} entries with {sum(map(len, held))} positions; "
            f"expected {world_size} entries, one a rank, that hold each of 0 ... {seq_len - 1} once"
        )
    return plan_of(_spec("positions", seq_len, world_size, bounds, _ranges_of(held)))
