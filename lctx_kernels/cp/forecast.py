"""What a ring over a plan will cost: bytes, the bandwidth that hides them, balance, efficiency."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import head_groups, memory_of
from .plan import Plan
from .schedule import Schedule, schedule_of

FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # per (query, key) pair, query head and head dimension


@dataclass(frozen=True)
class Direction:
    """The forward or the backward of one call.

    Attributes:
        hops: Exchanges of keys in which any rank takes part.
        bytes: Bytes sent by the rank that sends most.
        needed: Bytes/s at which no step waits for its hop; infinite where a step has a hop but
            nothing to compute.
        efficiency: Time of the computation, spread evenly over the ranks, over the predicted time.
        memory: Bytes beyond inputs and results of the rank that needs most: the keys that it
            sends and two slots for those that pass, the fp32 result; in the backward dq, dk and dv
            in fp32, two row constants, and two slots for the sums that pass; a third where own
            sums come home while others pass, as with windows and in contiguous plans.
    """

    hops: int
    bytes: int
    needed: float
    efficiency: float
    memory: int


@dataclass(frozen=True)
class Forecast:
    """Prediction for one call, printable.

    Attributes:
        plan: The plan.
        balance: Mean over maximum of the (query, key) pairs of a rank.
        pairs: (query, key) pairs of all ranks.
        forward, backward: The two directions.
    """

    plan: Plan
    balance: float
    pairs: int
    forward: Direction
    backward: Direction

    def __str__(self) -> str:
        plan = self.plan
        fewest, most = min(plan.lengths), max(plan.lengths)
        lines = [
            f"{plan.layout} over {plan.world_size} ranks, {plan.seq_len} tokens "
            f"({fewest} to {most} a rank), {len(plan.documents) - 1} document(s)",
            f"pairs {self.pairs:.3g}, balance {self.balance:.1%}",
        ]
        for name in ("forward", "backward"):
            d: Direction = getattr(self, name)
            lines.append(
                f"{name}: {d.hops} hops, {d.bytes / 1e6:.1f} MB sent, needs {d.needed / 1e9:.1f} "
                f"GB/s, efficiency {d.efficiency:.1%}, memory {d.memory / 1e6:.1f} MB"
            )
        return "\n".join(lines)


def _memory(schedule: Schedule, key_bytes: int, sum_bytes: tuple[int, ...], row_bytes: int) -> int:
    """key_bytes, sum_bytes: of a row on the wire; row_bytes: of a row of the rank."""
    return max(schedule.plan.lengths) * row_bytes + memory_of(schedule, key_bytes, sum_bytes)


def _seconds(work: float, rate: float) -> float:
    return work / rate if work else 0.0


def _direction(
    schedule: Schedule, *, flops_per_pair: float, flops: float, link: float, key_bytes: int,
    sum_bytes: tuple[int, ...], row_bytes: int,
) -> Direction:  # fmt: skip
    """Step by step, all ranks together: a step ends with its slowest rank or hop."""
    n = schedule.plan.world_size
    sent, hops, needed, total = [0] * n, 0, 0.0, 0.0
    for step in range(n):
        longest = 0.0
        moved = False
        for rank in range(n):
            source = schedule.source(rank, step)
            rows, in_ring = schedule.wire_rows(source), schedule.last[source] >= step
            size = rows * key_bytes if schedule.last[source] > step else 0
            moved = moved or size > 0
            if step and in_ring and schedule.first[source] <= step:
                size += rows * sum(sum_bytes)
            sent[rank] += size
            compute = _seconds(schedule.pairs(rank, source) * flops_per_pair, flops)
            longest = max(longest, compute, _seconds(size, link))
            if size:
                needed = max(needed, size / compute if compute else float("inf"))
        hops += moved
        total += longest
    pairs = sum(schedule.pairs(r, s) for r in range(n) for s in range(n))
    ideal = _seconds(pairs * flops_per_pair / n, flops)
    memory = _memory(schedule, key_bytes, sum_bytes, row_bytes)
    return Direction(hops, max(sent), needed, ideal / total if total else 1.0, memory)


def forecast(
    plan: Plan,
    *,
    query_heads: int,
    key_heads: int,
    head_dim: int,
    batch: int = 1,
    causal: bool = True,
    window: int | None = None,
    element_bytes: int = 2,
    forward_flops: float = 620e12,
    backward_flops: float = 540e12,
    link: float = 300e9,
) -> Forecast:
    """Predict bytes, needed bandwidth and efficiency of `ring_attention` over a plan.

    A model, not a measurement: every step takes as long as its slowest rank computes or sends, and
    launches cost nothing.

    Args:
        plan: Of `make_plan`.
        query_heads, key_heads, head_dim, batch: Shape of the call.
        causal, window: Mask of the call.
        element_bytes: Bytes of an element of k and v; gradients travel with 4 (8 for fp64).
        forward_flops, backward_flops: FLOP/s of the kernels; the defaults are those of an H200.
        link: Bytes/s each way while computing; the default is that of NCCL over NVLink.

    Returns:
        Forecast; `print` shows it.

    Source: this package; 4 D flops a visible pair and query head forward, 10 D backward.

    >>> from lctx_kernels import cp
    >>> print(cp.forecast(cp.make_plan(65536, 8), query_heads=32, key_heads=8, head_dim=128))
    zigzag over 8 ranks, 65536 tokens (8192 to 8192 a rank), 1 document(s)
    pairs 2.15e+09, balance 100.0%
    forward: 7 hops, 234.9 MB sent, needs 37.8 GB/s, efficiency 100.0%, memory 234.9 MB
    backward: 7 hops, 687.9 MB sent, needs 39.6 GB/s, efficiency 100.0%, memory 438.3 MB
    """
    schedule = schedule_of(plan, causal, window or 0)
    n = plan.world_size
    work = [sum(schedule.pairs(rank, source) for source in range(n)) for rank in range(n)]
    row = 2 * batch * key_heads * head_dim  # of k and v
    per_pair = batch * query_heads * head_dim
    stat, groups = max(4, element_bytes), head_groups(schedule, key_heads)
    forward = _direction(
        schedule, flops_per_pair=FORWARD_FLOPS * per_pair, flops=forward_flops, link=link,
        key_bytes=row * element_bytes, sum_bytes=(), row_bytes=stat * per_pair,
    )  # fmt: skip
    backward = _direction(
        schedule, flops_per_pair=BACKWARD_FLOPS * per_pair, flops=backward_flops, link=link,
        key_bytes=row * element_bytes,
        sum_bytes=tuple(2 * batch * (h1 - h0) * head_dim * stat for h0, h1 in groups),
        row_bytes=stat * (per_pair + row + 2 * batch * query_heads),
    )  # fmt: skip
    balance = sum(work) / n / max(work) if max(work) else 1.0
    return Forecast(plan, balance, sum(work), forward, backward)
