"""The first two steps in one launch, and own keys that a backward takes before foreign ones.

Forward, heads that need not fill the time of the first hop (`parts.py`) take own and first foreign
keys in one launch, so that nothing of theirs is carried. Backward, the last own keys come first,
which few rows see. Which is arithmetic on shapes: every transport, and the simulation, computes the
same. Source: this package.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .keys import Rank, of_shapes, rows_of
from .schedule import Call

# Of an H200: a hop by the copy engine, and kernels on short rows.
LINK, FORWARD_RATE, BACKWARD_RATE, STATISTICS = 370e9, 560e12, 430e12, 3e12
HOP_SECONDS, MARGIN = 30e-6, 1.2
CARRIED, WORTH = 8 / 4e12, 0.03  # seconds to carry an element; of a step's, that are worth saving
# Of a tile; tiles of own keys that are worth two launches, fewer under a hop of a tenth of them.
ROWS, FEWEST_TILES, FEWEST_UNDER_LONG_HOPS = 128, 1000, 700
HALF_FROM = 0.27  # where more of the rows would come first it is half of them


def hop_seconds(at: Rank, k: Tensor, v: Tensor) -> float:
    """Of the first hop."""
    coming = at.schedule.wire_rows(at.schedule.source(at.rank, 1))
    size = coming * k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size()
    return MARGIN * (size / LINK + HOP_SECONDS) if size else 0.0


def own_square(at: Rank, rows: int) -> Call | None:
    """The only call on own keys, if it is of all rows and has no window."""
    calls = at.schedule.calls[at.rank][at.rank]
    if at.world_size == 1 or len(calls) != 1 or calls[0][:4] != (0, rows, 0, rows):
        return None
    return calls[0] if calls[0][5:] == (0, 0) else None


@of_shapes
def own_calls(at: Rank, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Call], list[Call]]:
    """The backward's calls on own keys: before the first foreign keys are there, and at the end.

    Nothing comes first where the statistics of the rows take about as long as the hop, and where
    the rest would be too few tiles to keep all multiprocessors busy. Where many keys come first it
    is half of them: the two launches are of as many tiles, and of a zigzag's first rank it is those
    that no other rank sees, whose gradients leave the kernel as results.
    """
    calls, rows = list(at.schedule.calls[at.rank][at.rank]), q.shape[1]
    square = own_square(at, rows)
    uncovered = hop_seconds(at, k, v) - 2 * q.numel() * q.element_size() / STATISTICS
    if square is None or not square.causal or uncovered <= HOP_SECONDS:
        return [], calls
    per_pair = 5 * q.shape[0] * q.shape[2] * (k.shape[3] + v.shape[3])
    whole, tiles = square.pairs * per_pair / BACKWARD_RATE, rows // ROWS * k.shape[2] * k.shape[0]
    fewest = FEWEST_TILES if uncovered < whole / 10 else FEWEST_UNDER_LONG_HOPS
    if uncovered < whole and (tiles < fewest or uncovered < whole / 50):
        return [], calls
    side = math.sqrt(2 * uncovered * BACKWARD_RATE / per_pair)  # of a triangle that takes so long
    half = rows // ROWS // 2
    begin = (half if side > HALF_FROM * rows else (rows - math.ceil(side)) // ROWS) * ROWS
    if begin <= 0:
        return [], calls
    return [Call(begin, rows, begin, rows, True)], [Call(0, rows, 0, begin, True)]


class TwoSteps(NamedTuple):
    """The first two steps, taken together.

    Attributes:
        own: The call on own keys, of all rows.
        far: The call on the first foreign keys, of the last rows, without a mask.
        final: Rows [0, final) that no later step has.
    """

    own: Call
    far: Call
    final: int


@of_shapes
def two_steps(at: Rank, q: Tensor, k: Tensor, v: Tensor) -> TwoSteps | None:
    """How the first two steps go together; None where they do not, or where little is saved."""
    rows = q.shape[1]
    own = own_square(at, rows)
    if q.device.type == "cpu" or own is None:
        return None
    far = at.schedule.wire_calls(at.rank, at.schedule.source(at.rank, 1))
    if len(far) != 1 or far[0].causal or far[0].q1 != rows:
        return None
    alone, late = (at.schedule.final_rows(at.rank)[0][step][0] for step in (0, 1))
    if late and alone != far[0].q0:
        return None
    per_pair = 2 * q.shape[0] * q.shape[2] * (k.shape[3] + v.shape[3])
    if CARRIED * q.numel() < WORTH * own.pairs * per_pair / FORWARD_RATE:
        return None
    return TwoSteps(own, far[0], far[0].q0 + late if late else alone)


def forward_together(
    at: Rank, two: TwoSteps, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor,
    carry: Tensor, lse: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """All rows over own keys, and those that see them over the first foreign ones too."""
    k0, k1 = two.far.k0, two.far.k1
    torch.ops.lctx.flash_carry_two(
        q, k, v, rows_of(far_k, k0, k1), rows_of(far_v, k0, k1), carry, lse, out, two.own.causal,
        at.scale, two.far.q0, two.final,
    )  # fmt: skip
