"""What two GPUs would take for a ring, told by one: `python -m bench.ring_solo --save`.

One GPU does the work of one rank and then of the other, kernels, streams and waits as they are on
two; a hop takes as long as it would between them, by a copy to the host on the copy engine, which
no multiprocessor takes part in. What the other rank would have sent is random numbers, so that
results mean nothing and times do. On two GPUs the ring takes as long as the slower rank: speeds are
within a few hundredths of those of `bench.ring`.
"""

import argparse
import dataclasses
import datetime
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lctx_kernels import cp, flash_attention
from lctx_kernels.cp import steps
from lctx_kernels.cp.device import LANE_PRIORITIES
from lctx_kernels.cp.keys import Rank
from lctx_kernels.cp.schedule import Schedule, schedule_of
from lctx_kernels.cp.transport import Hop, run_alone

from .machine import clocks_now, describe_machine, measure_peak
from .registry import Shape, flops, min_bytes
from .results import Document, Row, default_path
from .ring import AHEAD, HEADS, LONG, SAMPLE_SECONDS, K
from .ring_tables import SOLO, ring_solo_table
from .timing import FLUSH_BYTES, LAUNCH_AHEAD_CYCLES

LINK, START = 384e9, 10e-6  # bytes/s each way, and seconds until a hop begins, between two H200
PROBE_BYTES = 256 << 20
CASES = ((16 * K, "fwd"), (16 * K, "fwd_bwd"), (64 * K, "fwd"), (64 * K, "fwd_bwd"),
         (256 * K, "fwd"))  # fmt: skip
FEWEST, MOST = 5, 60  # rounds


class SoloTransport:
    """Hops that take their time and bring nothing."""

    gathers = True

    def __init__(self, device: torch.device) -> None:
        self.lanes = [torch.cuda.Stream(device, priority=p) for p in LANE_PRIORITIES]
        self.channels = [torch.cuda.Stream(device, priority=p) for p in (-5, -4)]
        self.held = torch.empty(0, dtype=torch.uint8, device=device)
        self.source = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
        self.host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.rate = self._bytes_per_second()

    def _bytes_per_second(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            start.record()
            self.host.copy_(self.source, non_blocking=True)
            end.record()
            torch.cuda.synchronize()
        return PROBE_BYTES / (start.elapsed_time(end) * 1e-3)

    def memory(self, size: int, device: torch.device) -> Tensor:
        """As Transport; numbers as keys and values have them."""
        if self.held.numel() < size:
            numbers = torch.randn(-(-size // 2), device=device, dtype=torch.bfloat16)
            self.held = numbers.view(torch.uint8)
        return self.held[:size]

    def post(self, hop: Hop) -> torch.cuda.Event:
        """As Transport: keys are there when they have come, sums when those sent have left too."""
        sums = hop.phase == "backward dkv"
        stream = self.channels[sums]
        stream.wait_event(torch.cuda.current_stream().record_event())
        there = max(hop.bytes_sent, hop.bytes_received) if sums else hop.bytes_received
        left = int(((there or hop.bytes_sent) / LINK + START) * self.rate)
        with torch.cuda.stream(stream):
            while left > 0:
                part = min(left, PROBE_BYTES)
                self.host[:part].copy_(self.source[:part], non_blocking=True)
                left -= part
        return stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        """As Transport."""
        torch.cuda.current_stream().wait_event(ticket)

    def done(self, ticket: torch.cuda.Event) -> bool:
        """As Transport."""
        return bool(ticket.query())

    def settle(self) -> None:
        """As Transport: what leaves has left long before a call ends."""

    def use_stream(self, stream: int) -> int:
        """As Transport: the current one."""
        return 0

    def abort(self, reason: str = "") -> None:
        """As Transport."""

    def close(self) -> None:
        """As Transport."""


def calls_of(shape: Shape, pass_: str, transport: SoloTransport) -> dict[str, Callable[[], object]]:
    """One GPU with the whole sequence, and each of two ranks with its part."""
    sizes = ((shape.B, shape.T, h, shape.D) for h in (shape.Hq, shape.Hkv, shape.Hkv, shape.Hq))
    x = [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    plan = cp.make_plan(shape.T, 2)
    schedule = schedule_of(plan, True, 0)
    parts = [[cp.shard(plan, t, 1, rank) for t in x] for rank in (0, 1)]
    leaves = [t.requires_grad_(pass_ != "fwd") for t in x[:3]]

    def alone() -> None:
        out = flash_attention(*leaves)
        if pass_ != "fwd":
            torch.autograd.grad(out, leaves, x[3])

    def part(rank: int) -> Callable[[], object]:
        return lambda: _rank(rank, schedule, transport, parts[rank], pass_)

    return {"flash": alone, "rank 0": part(0), "rank 1": part(1)}


def _rank(
    rank: int, schedule: Schedule, transport: SoloTransport, x: Sequence[Tensor], pass_: str
) -> None:
    at = Rank(rank, schedule, transport, x[0].shape[-1] ** -0.5, deterministic=False)
    out, lse = run_alone(steps.forward(at, *x[:3]), transport)
    if pass_ != "fwd":
        run_alone(steps.backward(at, x[3], None, *x[:3], out, lse), transport)


def run_case(shape: Shape, pass_: Any, transport: SoloTransport, seconds: float) -> list[Row]:
    """One GPU and both ranks, round robin from cold L2; long calls several in a row, as there."""
    flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = calls_of(shape, pass_, transport)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    in_a_row = dict.fromkeys(calls, 1)

    def sample(name: str) -> float:
        flush.sum()
        torch.cuda._sleep(AHEAD * LAUNCH_AHEAD_CYCLES)
        start.record()
        for _ in range(in_a_row[name]):
            calls[name]()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / in_a_row[name]

    names = list(calls)
    first = [sample(name) for name in names]
    if first[0] >= LONG:
        in_a_row |= {n: math.ceil(SAMPLE_SECONDS / s) for n, s in zip(names, first, strict=True)}
    begin = time.perf_counter()
    for done in itertools.count():
        if done >= MOST or (done >= FEWEST and time.perf_counter() - begin > seconds):
            break
        at = done % len(names)
        for name in names[at:] + names[:at]:
            samples[name].append(sample(name))
    slower = max(names[1:], key=lambda name: statistics.median(samples[name]))
    rows = []
    for candidate, name in (("flash", "flash"), (SOLO, slower)):
        row = Row(candidate, "flash", pass_, dataclasses.asdict(shape), "ok")
        row.q1_s, row.median_s, row.q3_s = statistics.quantiles(samples[name], n=4)
        row.rounds, row.flops = len(samples[name]), flops("flash", shape, pass_, {})
        row.formula, row.flops_per_s = "2*B*Hq*T*T*D", row.flops / row.median_s
        row.min_bytes, row.calls = min_bytes("flash", shape, pass_), in_a_row[name]
        rows.append(row)
    rows[1].gpus_s = [statistics.median(samples[name]) for name in names[1:]]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(prog="bench.ring_solo", description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="into bench/results/<gpu>/")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a shape")
    options = parser.parse_args(arguments)
    document = Document("ring_solo", describe_machine("cuda"), checked=True)
    document.date = datetime.date.today().isoformat()
    document.peak_flops = {"bf16": measure_peak("cuda", torch.bfloat16)}
    transport = SoloTransport(torch.device("cuda", torch.cuda.current_device()))
    cases = [(Shape(T, Hq=q, Hkv=kv, D=128, dtype="bf16"), p) for T, p in CASES for q, kv in HEADS]
    for number, (shape, pass_) in enumerate(cases, 1):
        rows = run_case(shape, pass_, transport, options.seconds)
        for row in rows:
            row.group = number
        document.rows += rows
        torch.cuda.empty_cache()
    document.machine |= clocks_now("cuda")
    print("\n".join(ring_solo_table(document)))
    if options.save:
        path = default_path(document.machine["kind"], "ring_solo")
        document.save(path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
