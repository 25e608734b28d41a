"""Which heads take their own keys first in a forward, and which take them last.

A launch ends with fewer tiles than multiprocessors. The tiles of a step on foreign keys are all
equally long, those of the own square grow shorter: with some of these at the end little of the
device is idle. The others come first, under the first hop. Every transport, and the simulation,
computes the same. Source: this package.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .keys import Rank, cut, of_shapes
from .together import FORWARD_FLOPS, hop_seconds, own_square

WORTH_SECONDS = 1e-3  # of own keys: less, and the host of twice as many calls would be late


class Part(NamedTuple):
    """Some batches, or some heads.

    Attributes:
        batches, query_heads, key_heads: Which.
        own_last: Whether own keys come behind those of all other ranks.
    """

    batches: slice
    query_heads: slice
    key_heads: slice
    own_last: bool = False

    def queries(self, x: Tensor) -> Tensor:
        """Of (B, L, Hq, D)."""
        return self._piece(x, 2, self.query_heads)

    def keys(self, x: Tensor) -> Tensor:
        """Of (B, L, Hkv, D)."""
        return self._piece(x, 2, self.key_heads)

    def statistics(self, x: Tensor) -> Tensor:
        """Of (B, Hq, L)."""
        return self._piece(x, 1, self.query_heads)

    def _piece(self, x: Tensor, dim: int, heads: slice) -> Tensor:
        batches = cut(x, 0, self.batches.start, self.batches.stop)
        return cut(batches, dim, heads.start, heads.stop)

    def fills(self, at: Rank) -> bool:
        """Whether the first step has every row exactly once."""
        return at.schedule.step_fills(at.rank, int(self.own_last))


def whole(q: Tensor, k: Tensor) -> Part:
    """Everything, own keys first."""
    return Part(slice(0, q.shape[0]), slice(0, q.shape[2]), slice(0, k.shape[2]))


@of_shapes
def parts_of(at: Rank, q: Tensor, k: Tensor, v: Tensor) -> list[Part]:
    """Two where own keys are a triangle that takes long and every step is one launch, else one.

    The first part is half, or as much as has enough to do with own keys until others are there.
    """
    (B, rows, heads, _), G = k.shape, q.shape[2] // k.shape[2]
    all_, own, count = whole(q, k), own_square(at, rows), B if B > 1 else heads
    if own is None or not own.causal or max(map(len, at.schedule.calls[at.rank])) != 1:
        return [all_]
    seconds = own.pairs * 2 * q.shape[0] * q.shape[2] * (k.shape[3] + v.shape[3]) / FORWARD_FLOPS
    if seconds <= WORTH_SECONDS:
        return [all_]
    share = hop_seconds(at, k, v) / seconds
    cut = max((count + 1) // 2, math.ceil(min(share, 1.0) * count))
    if cut >= count:
        return [all_]
    pieces = ((slice(0, cut), False), (slice(cut, count), True))
    if B > 1:
        return [all_._replace(batches=piece, own_last=last) for piece, last in pieces]
    return [
        Part(slice(0, B), slice(piece.start * G, piece.stop * G), piece, last)
        for piece, last in pieces
    ]
