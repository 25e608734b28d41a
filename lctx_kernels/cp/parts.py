"""Which heads take their own keys first in a forward, under the first hop, and what the others do.

Where own keys are short, so that carrying a partial result is much of a step, the others wait for
the first foreign keys and take both in one launch. Where they are long, the others take their own
keys last: a launch ends with fewer tiles than multiprocessors, the tiles of a step on foreign keys
are all equally long, those of the own square grow shorter, and with some of these at the end little
of the device is idle. Every transport, and the simulation, computes the same. Source: this package.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .keys import Rank, cut, of_shapes
from .together import FORWARD_RATE, TwoSteps, hop_seconds, own_square, two_steps

WORTH_SECONDS = 0.5e-3  # of own keys: less, and the host of twice as many calls would be late
LONG = 8704  # own keys: with more, to carry takes less than two steps together lose
LEAST = 0.25  # of the heads before others take two steps together: fewer are few and long tiles


class Part(NamedTuple):
    """Some batches, or some heads.

    Attributes:
        batches, query_heads, key_heads: Which.
        own_last: Whether own keys come behind those of all other ranks.
        two: How own and first foreign keys are taken together, or None.
    """

    batches: slice
    query_heads: slice
    key_heads: slice
    own_last: bool = False
    two: TwoSteps | None = None

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
    """Two where every step is one launch and either way is worth it, else one; lanes in this order.

    The part that begins has as much to do with own keys as the first hop takes, where the other
    takes its own last at least half.
    """
    (B, rows, heads, _), G = k.shape, q.shape[2] // k.shape[2]
    all_, own, count = whole(q, k), own_square(at, rows), B if B > 1 else heads
    if own is None:
        return [all_]
    seconds = own.pairs * 2 * q.shape[0] * q.shape[2] * (k.shape[3] + v.shape[3]) / FORWARD_RATE
    share = hop_seconds(at, k, v) / seconds if seconds else 1.0
    single = max(map(len, at.schedule.calls[at.rank])) == 1  # a launch is a step
    own_last = own.causal and single and seconds > WORTH_SECONDS
    two = None if own_last and rows > LONG else two_steps(at, q, k, v)
    if two is not None:
        share = max(share, LEAST)
    elif own_last:
        share = max(share, (count + 1) // 2 / count)
    else:
        return [all_]
    begin = math.ceil(min(share, 1.0) * count)
    if begin >= count:
        return [all_]
    first, last = slice(0, begin), slice(begin, count)
    parts = [
        all_._replace(batches=piece) if B > 1
        else all_._replace(query_heads=slice(piece.start * G, piece.stop * G), key_heads=piece)
        for piece in (first, last)
    ]  # fmt: skip
    if two is None:
        return [parts[0], parts[1]._replace(own_last=True)]
    return [parts[1]._replace(two=two), parts[0]]  # the longer tiles first
