"""Ring attention on several GPUs against one: `torchrun --nproc-per-node 2 -m bench.ring --save`.

Every rank times `flash_attention` on the whole sequence too, all GPUs at the same time, so that the
ratio compares the same chips at the same power. A time in a round is that of the slowest GPU, from
a start that the GPUs agree on, for the ring and for the whole sequence alike: a ring cannot be
faster than its slowest chip. `gpus_s` has every GPU's own times. Had each GPU as much work as it
does in the same time, a ring would take 1 / sum(1 / gpus_s) of the whole sequence's: the most that
these GPUs could give, somewhat more than their number where one of them is slower.

Where power limits the clocks they change every 50 ms. Where the whole sequence takes long enough
for that, a sample of either is calls in a row, each behind the one before, that see several clocks.
"""

import argparse
import dataclasses
import datetime
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lctx_kernels import cp, flash_attention, ring_attention
from lctx_kernels._measure import relative_rms
from lctx_kernels.cp.choose import choose
from lctx_kernels.cp.device import KINDS
from lctx_kernels.cp.transport import Hop

from .fa2_ring import fa2_ring
from .machine import clocks_now, describe_machine, measure_peak
from .registry import PASSES, Goal, Group, Shape, flops, min_bytes
from .results import Document, GoalResult, MemoryRow, Row, default_path, goal_results
from .ring_tables import RIVAL
from .run import show_goals, show_rows
from .timing import FLUSH_BYTES, LAUNCH_AHEAD_CYCLES, describe_error

K = 1024
HEADS = ((32, 8), (16, 16))
# Tokens: speed against one GPU that is wanted and aimed at, forward; forward + backward.
WANTED = {
    16 * K: ((1.85, 1.92), (1.80, None)),
    64 * K: ((1.95, 1.99), (1.95, None)),
    128 * K: (None, None),
    256 * K: ((1.97, 1.99), None),
}
ONE_TRANSPORT = 128 * K  # tokens from which on all transports are alike
LONGEST_BACKWARD = 128 * K
DOCUMENTS = (  # two batches of packed documents of 12k to 24k tokens
    (12288, 23040, 17920, 14080, 20992, 16000, 24000, 12800),
    (19200, 13312, 22272, 15104, 18176, 23808, 12544),
)
MILLION = Shape(2**20, Hq=4, Hkv=1, D=128, dtype="bf16")
HOP_SECONDS = 12e-6  # of the host
HOPS, HOPS_AHEAD = 2000, 100
RIVAL_SPEED = 1.6  # FLOP/s of a GPU against those of FlashAttention-2's ring
AHEAD = 4  # times what one kernel gets: a forward and backward of a ring are many calls
# Clocks change by a tenth from run to run where power is what limits them, on every GPU by itself,
# so that the two whose ratio is a goal run many times, and the others in some of the rounds.
MOST_ROUNDS, OTHERS_EVERY = 100, 4
SAMPLE_SECONDS = 0.1  # at least, where one GPU takes LONG or more for the whole sequence
LONG = 0.02
TOLERANCE = 1e-2  # relative RMS against one GPU: two results rounded to bf16


def groups(transports: list[str], lengths: list[int], documents: bool, rival: bool) -> list[Group]:
    """Every shape and pass, the longest last; the first transport has the goals."""
    names = tuple(f"ring-{transport}" for transport in transports)
    short, packed, long = [], [], []
    for T in lengths:
        for heads in HEADS if WANTED[T] != (None, None) else HEADS[:1]:
            shape = Shape(T, Hq=heads[0], Hkv=heads[1], D=128, dtype="bf16")
            for pass_, wanted in zip(PASSES, WANTED[T], strict=True):
                if T > LONGEST_BACKWARD and pass_ != "fwd":
                    continue
                goals: tuple[Goal, ...] = ()
                if wanted is not None:
                    goals = (Goal(names[0], "flash", *wanted, label=f"ring, {pass_}"),)
                rings = names if T < ONE_TRANSPORT else names[:1]
                if rival and (T < ONE_TRANSPORT or (T == ONE_TRANSPORT and pass_ == "fwd")):
                    rings += (RIVAL,)
                    goals += (Goal(names[0], RIVAL, RIVAL_SPEED, label=f"rival, {pass_}"),)
                group = Group(shape, pass_, ("flash", *rings), goals)
                (short if T < ONE_TRANSPORT else long).append(group)
        if T < ONE_TRANSPORT:
            shape = Shape(T, Hq=HEADS[0][0], Hkv=HEADS[0][1], D=128, dtype="bf16")
            always = (("deterministic", True),)
            packed.append(Group(shape, "fwd_bwd", ("flash", names[0]), (), always))
    for i, lengths_of in enumerate(DOCUMENTS if documents else ()):
        shape = Shape(sum(lengths_of), Hq=32, Hkv=8, D=128, dtype="bf16")
        for pass_ in PASSES:
            goals = (Goal(names[0], "flash", 1.7, label=f"documents, {pass_}"),)
            options = (("documents", i),)
            packed.append(Group(shape, pass_, ("flash", names[0]), goals, options))
    packed.sort(key=lambda group: not group.goals)
    return [*short, *packed, *long]


class Ranks:
    """This process's rank among the GPUs of a benchmark."""

    def __init__(self) -> None:
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.host = dist.new_group(backend="gloo")
        self.token = torch.zeros(1, device="cuda")
        self.flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")
        dist.all_reduce(self.token)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.host)
        return found

    def sample(self, fn: Callable[[], object], calls: int = 1) -> float:
        """Seconds of one of `calls` in a row on this GPU, from a start of all GPUs, with cold L2.

        A call's hops begin behind the call before, as those of the next layer of a model would.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.sum()
        torch.cuda._sleep(AHEAD * LAUNCH_AHEAD_CYCLES)
        dist.all_reduce(self.token)
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    def slowest(self, fn: Callable[[], object]) -> float:
        """Seconds of fn on the slowest GPU, the same on all ranks."""
        return float(max(self.gather(self.sample(fn))))


def calls_of(group: Group, ranks: Ranks) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """What each candidate runs: the whole sequence on one GPU, or this rank's part."""
    s, options = group.shape, dict(group.options)
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((s.B, s.T, h, s.D) for h in (s.Hq, s.Hkv, s.Hkv, s.Hq))
    *qkv, dout = (
        torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
        for size in sizes
    )
    documents = None
    if (batch := options.pop("documents", None)) is not None:
        documents = torch.tensor([0, *DOCUMENTS[batch]]).cumsum(0).int()
    plan = cp.make_plan(s.T, ranks.world_size, cu_seqlens=documents)
    local = [cp.shard(plan, x, 1, ranks.rank) for x in (*qkv, dout)]

    def call(function: Callable[..., torch.Tensor], x: list[torch.Tensor], **more: Any) -> Any:
        leaves = [t.requires_grad_(group.pass_ != "fwd") for t in x[:3]]

        def run() -> tuple[torch.Tensor, ...]:
            out = function(*leaves, **more)
            if group.pass_ == "fwd":
                return (out,)
            return (out.detach(), *torch.autograd.grad(out, leaves, x[3]))

        return run

    on_gpu = None if documents is None else documents.cuda()
    made = {"flash": call(flash_attention, [*qkv, dout], cu_seqlens=on_gpu, **options)}
    more = {"deterministic": False, **options}
    for name in group.candidates[1:]:
        if name == RIVAL:
            made[name] = call(fa2_ring, local)
            continue
        transport = name.removeprefix("ring-")
        made[name] = call(ring_attention, local, plan=plan, transport=transport, **more)
    return made


def check(group: Group, ranks: Ranks, name: str, calls: dict[str, Any], row: Row) -> None:
    """Largest relative RMS difference to one GPU over the ranks; sets the row's status."""
    s, options = group.shape, dict(group.options)
    documents = None
    if "documents" in options:
        documents = torch.tensor([0, *DOCUMENTS[options["documents"]]]).cumsum(0).int()
    plan = cp.make_plan(s.T, ranks.world_size, cu_seqlens=documents)
    wanted = [cp.shard(plan, x, 1, ranks.rank) for x in calls["flash"]()]
    found = calls[name]()
    names = ("out", "dq", "dk", "dv")
    for what, a, b in zip(names, found, wanted, strict=False):
        rows = slice(0, None, -(-a.shape[1] // 8192))  # of the whole sequence; doubles need room
        row.errors[f"{what} against one GPU"] = relative_rms(a[:, rows], b[:, rows])
    every = ranks.gather(row.errors)
    row.errors = {what: max(e[what] for e in every) for what in row.errors}
    row.limits = dict.fromkeys(row.errors, TOLERANCE)
    if any(not e <= TOLERANCE for e in row.errors.values()):
        row.status, row.reason = "check_failed", f"{row.errors}"


def forward_and_backward(
    shape: Shape, ranks: Ranks, transport: str
) -> tuple[dict[str, int], cp.Forecast]:
    """Peak bytes of both directions of one call, beyond inputs and results, and the forecast."""
    plan = cp.make_plan(shape.T, ranks.world_size)
    sizes = ((shape.B, plan.lengths[ranks.rank], h, shape.D) for h in (shape.Hq, *[shape.Hkv] * 2))
    x = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in sizes]
    found, group = {}, dist.new_group(backend="nccl")  # whose memory no other call has made larger
    given = choose(group, x[0].device, transport)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ring_attention(*x, plan=plan, group=group, transport=transport)
    kept = torch.cuda.memory_allocated() - before  # out and lse, for the backward
    found["fwd"] = torch.cuda.max_memory_allocated() - before - kept + given.memory_bytes
    dout = torch.randn_like(out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, x, dout)
    cp.synchronize(group)
    torch.cuda.synchronize()
    kept = sum(g.nbytes for g in grads)
    found["bwd"] = torch.cuda.max_memory_allocated() - before - kept + given.memory_bytes
    assert all(g.isfinite().all() for g in grads)
    return found, cp.forecast(
        plan, query_heads=shape.Hq, key_heads=shape.Hkv, head_dim=shape.D, batch=shape.B
    )


def memory_rows(ranks: Ranks, transport: str) -> list[MemoryRow]:
    """A million tokens, forward and backward, against the documented formula."""
    shape = dataclasses.asdict(MILLION)
    lengths = [shape.pop("T")]
    found, forecast = forward_and_backward(MILLION, ranks, transport)
    promised = {"fwd": forecast.forward.memory, "bwd": forecast.backward.memory}
    every = ranks.gather(found)
    return [
        MemoryRow(
            f"ring-{transport}", pass_, shape, lengths, [max(e[pass_] for e in every)], "ok",
            promised_bytes=[promised[pass_]],
        )
        for pass_ in promised
    ]  # fmt: skip


def hop_row(ranks: Ranks, transport: str) -> tuple[Row, GoalResult]:
    """Time of the host for posting a hop of 1 MB and for waiting for it, the slowest rank."""
    at = choose(dist.group.WORLD, torch.device("cuda", torch.cuda.current_device()), transport)
    size = 1 << 20
    memory = at.memory(2 * size, ranks.token.device)
    after, before = (ranks.rank + 1) % ranks.world_size, (ranks.rank - 1) % ranks.world_size
    hop = Hop("forward kv", 0, 0, ((after, memory[:size]),), ((before, memory[size:]),), (size,))
    times = []
    for i in range(2 * HOPS):  # half of them to warm up
        begin = time.perf_counter()
        at.wait(at.post(hop))
        times.append(time.perf_counter() - begin)
        if i % HOPS_AHEAD == 0:
            cp.synchronize()  # before the GPU's queue is full, and the host waits for the GPU
    times = times[HOPS:]
    quartiles = [max(q) for q in zip(*ranks.gather(statistics.quantiles(times, n=4)), strict=True)]
    shape = dataclasses.asdict(Shape(1))
    row = Row(f"hop-{transport}", "hop", "fwd", shape, "ok")
    row.q1_s, row.median_s, row.q3_s = quartiles
    row.rounds, row.flops, row.flops_per_s, row.min_bytes = HOPS, 0.0, 0.0, size
    row.percent_of_peak = 0.0
    goal = GoalResult(
        row.candidate, "12 us of the host", "fwd", shape, 1.0, HOP_SECONDS / quartiles[1],
        label=f"host time of a hop, {transport}",
    )  # fmt: skip
    return row, goal


def run_group(group: Group, ranks: Ranks, seconds: float, peak: float) -> list[Row]:
    """The rows of a group, the same on every rank."""
    shape = dataclasses.asdict(group.shape)
    options = dict(group.options)
    rows = [Row(n, "flash", group.pass_, shape, "ok", options=options) for n in group.candidates]
    calls = calls_of(group, ranks)
    for row in rows[1:]:
        reason = None
        try:
            check(group, ranks, row.candidate, calls, row)
        except NotImplementedError as error:
            reason = describe_error(error)
        if reasons := [r for r in ranks.gather(reason) if r]:
            row.status, row.reason = "unsupported", reasons[0]
    timed = [row for row in rows if row.status == "ok"]
    if ranks.slowest(calls["flash"]) >= LONG:
        for row in timed:
            row.calls = math.ceil(SAMPLE_SECONDS / ranks.slowest(calls[row.candidate]))
    samples: dict[str, list[float]] = {row.candidate: [] for row in timed}
    begin = time.perf_counter()
    while True:
        done = len(samples["flash"])
        now = timed if done % OTHERS_EVERY == 0 else timed[:2]
        for row in now[done % len(now) :] + now[: done % len(now)]:
            samples[row.candidate].append(ranks.sample(calls[row.candidate], row.calls))
        seconds_of_group = time.perf_counter() - begin
        enough = (done > OTHERS_EVERY and seconds_of_group > seconds) or done >= MOST_ROUNDS
        if any(ranks.gather(enough)):
            break
    work = flops("flash", group.shape, group.pass_, {})
    if "documents" in options:
        work *= sum(n * n for n in DOCUMENTS[options["documents"]]) / group.shape.T**2
    for row in timed:
        of_ranks = ranks.gather(samples[row.candidate])
        times = [max(round_) for round_ in zip(*of_ranks, strict=True)]
        row.gpus_s = [statistics.median(of_rank) for of_rank in of_ranks]
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        row.median_s, row.q1_s, row.q3_s, row.rounds = (
            statistics.median(times),
            low,
            high,
            len(times),
        )
        row.flops, row.formula = work, "2*B*Hq*T*T*D, of each document"
        row.flops_per_s = work / row.median_s
        row.min_bytes = min_bytes("flash", group.shape, group.pass_)
        gpus = 1 if row.candidate == "flash" else ranks.world_size
        row.percent_of_peak = 100 * row.flops_per_s / (gpus * peak)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run on every rank; the first one prints and writes."""
    parser = argparse.ArgumentParser(prog="bench.ring", description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="into bench/results/<gpus>/ring.json")
    parser.add_argument("--transports", default="p2p,nccl,pg", help="the first one has the goals")
    parser.add_argument("--lengths", default=",".join(str(T // K) for T in WANTED), help="in 1024")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a shape")
    parser.add_argument("--no-documents", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-rival", action="store_true", help="FlashAttention-2's ring")
    options = parser.parse_args(arguments)
    ranks = Ranks()
    machine = describe_machine("cuda")
    machine["kind"] += f"x{ranks.world_size}"
    document = Document("ring", machine, checked=True, date=datetime.date.today().isoformat())
    lengths = [int(n) * K for n in options.lengths.split(",")]
    peak = measure_peak("cuda", torch.bfloat16)
    document.peak_flops = {"bf16": statistics.mean(ranks.gather(peak))}
    transports = options.transports.split(",")
    path = default_path(machine["kind"], "ring") if options.save and ranks.rank == 0 else None
    for transport in [t for t in transports if t in KINDS]:
        row, goal = hop_row(ranks, transport)
        document.rows.append(row)
        document.goals.append(goal)
    wanted = groups(transports, lengths, not options.no_documents, not options.no_rival)
    for number, group in enumerate(wanted, 1):
        if group.shape.T >= ONE_TRANSPORT and "documents" not in dict(group.options):
            measure_memory(document, ranks, options.no_memory, transports[0])
        rows = run_group(group, ranks, options.seconds, document.peak_flops["bf16"])
        goals = goal_results(group, rows)
        for result in (*rows, *goals):
            result.group = number
        document.rows += rows
        document.goals += goals
        if ranks.rank == 0:
            show_rows(group, rows, goals)
            sys.stdout.flush()
        if path is not None and not document.failed:
            document.save(path)  # as far as it has come
        torch.cuda.empty_cache()
    measure_memory(document, ranks, options.no_memory, transports[0])
    document.machine |= clocks_now("cuda")
    if ranks.rank == 0:
        show_goals(document)
        print(*document.failed, sep="\n")
    if path is not None and not document.failed:
        document.save(path)
        print(f"wrote {path}")
    dist.barrier(group=ranks.host)
    os._exit(1 if document.failed else 0)


def measure_memory(document: Document, ranks: Ranks, skip: bool, transport: str) -> None:
    """Once, before the longest shapes."""
    if skip or document.memory:
        return
    document.memory = memory_rows(ranks, transport)
    torch.cuda.empty_cache()
    for memory in document.memory if ranks.rank == 0 else ():
        print(f"  {memory.candidate} {memory.pass_}: {memory.extra_bytes} bytes at"
              f" {memory.lengths} tokens, promised {memory.promised_bytes}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
