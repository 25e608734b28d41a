"""What a rank computes while the first keys are on their way: some heads over its own keys.

Forward, these heads' results are carried over the first hop; the others take own and first foreign
keys in one launch after it, so that nothing of theirs is carried. How many heads is arithmetic on
shapes: every transport, and the simulation, computes the same. Source: this package.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .keys import Rank
from .schedule import Call

# Of an H200: keys of a hop, kernels, and what a hop takes beyond its bytes.
LINK, FORWARD_FLOPS, BACKWARD_FLOPS, STATISTICS = 330e9, 650e12, 560e12, 3e12
HOP_SECONDS, MARGIN = 30e-6, 1.1


def _seconds(at: Rank, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float]:
    """Of the first hop, and of a key/value head over own keys per FLOP/s of a forward."""
    B, _, Hkv, _ = k.shape
    coming = at.schedule.wire_rows(at.schedule.source(at.rank, 1))
    size = coming * B * Hkv * (k.shape[3] + v.shape[3]) * k.element_size()
    pairs = at.schedule.pairs(at.rank, at.rank)
    work = 2 * B * pairs * (q.shape[2] // Hkv) * (k.shape[3] + v.shape[3])
    return (MARGIN * (size / LINK + HOP_SECONDS) if size else 0.0), work


def heads_before(at: Rank, q: Tensor, k: Tensor, v: Tensor) -> int:
    """Key/value heads whose own gradients are computed before the first foreign keys are there.

    0 where the statistics of the rows take about as long; at most half, the others hide the way
    home.
    """
    if at.world_size == 1 or not at.schedule.calls[at.rank][at.rank]:
        return 0
    hop, work = _seconds(at, q, k, v)
    uncovered = hop - 2 * q.numel() * q.element_size() / STATISTICS
    heads, a_head = k.shape[2], 2.5 * work / BACKWARD_FLOPS
    if not work or uncovered <= min(2 * HOP_SECONDS, heads * a_head):
        return 0
    return min(max(int(-(-uncovered // a_head)), heads // 4), heads // 2)


class TwoSteps(NamedTuple):
    """The first two steps, taken together.

    Attributes:
        own: The call on own keys, of all rows.
        far: The call on the first foreign keys, of the last rows, without a mask.
        heads: Query heads that take own keys alone, in a launch before.
        final: Rows [0, final) that no later step has.
        early: Rows [0, early) that only own keys have.
    """

    own: Call
    far: Call
    heads: int
    final: int
    early: int


def two_steps(at: Rank, q: Tensor, k: Tensor, v: Tensor) -> TwoSteps | None:
    """How the first two steps go together; None where they do not."""
    if q.device.type == "cpu" or at.world_size == 1:
        return None
    source, rows = at.schedule.source(at.rank, 1), q.shape[1]
    own, far = at.schedule.calls[at.rank][at.rank], at.schedule.wire_calls(at.rank, source)
    if len(own) != 1 or len(far) != 1 or own[0][:4] != (0, rows, 0, rows) or own[0][5:] != (0, 0):
        return None
    if far[0].causal or far[0].q1 != rows:
        return None
    early, late = (at.schedule.final_rows(at.rank)[0][step][0] for step in (0, 1))
    if late and early != far[0].q0:
        return None
    hop, work = _seconds(at, q, k, v)
    groups = int(-(-hop * FORWARD_FLOPS // work)) if work else k.shape[2]
    if groups >= k.shape[2]:
        return None
    heads = groups * (q.shape[2] // k.shape[2])
    return TwoSteps(own[0], far[0], heads, far[0].q0 + late if late else early, early)


def forward_before(
    at: Rank, two: TwoSteps, q: Tensor, k: Tensor, v: Tensor, carry: Tensor, lse: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """The heads that take own keys alone."""
    heads, groups = two.heads, two.heads * k.shape[2] // q.shape[2]
    torch.ops.lctx.flash_carry(
        q[:, :, :heads], k[:, :, :groups], v[:, :, :groups], carry[:, :, :heads], lse[:, :heads],
        two.own.causal, at.scale, 0, 0, 0, False, True, out[:, :, :heads], two.early,
    )  # fmt: skip


def forward_together(
    at: Rank, two: TwoSteps, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor,
    carry: Tensor, lse: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Those heads over the first foreign keys, all others over both."""
    keys = slice(two.far.k0, two.far.k1)
    torch.ops.lctx.flash_carry_two(
        q, k, v, far_k[:, keys], far_v[:, keys], carry, lse, out, two.own.causal, at.scale,
        two.far.q0, two.heads, two.final,
    )  # fmt: skip
