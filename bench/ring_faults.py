"""Faults of a ring on two GPUs, one after the other: `python -m bench.ring_faults --save`.

Pairs of processes, one GPU each, live through several faults: a late rank, another length, two
communicators in another order; the last one of a pair is kill -9. A run is right when every rank
that lives gets the exception that belongs to the fault within the timeout and GRACE seconds, and
goes on with a new group. Several pairs share the two GPUs, or all share one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import faulthandler
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lctx_kernels import cp, ring_attention
from lctx_kernels.cp import device

from .machine import be_a_host, describe_machine
from .results import default_path

TIMEOUT, GRACE, PATIENCE = 1.0, 5.0, 20.0  # seconds; PATIENCE: of a pair for one fault
LENGTHS = (1100, 700)
HOPS = (("forward kv", 0), ("backward kv", 0), ("backward dkv", 1))
LIVING = ("delayed", "another length", "second communicator")
KINDS = (*LIVING, "killed")
GPUS = min(torch.cuda.device_count(), 2)
TRANSPORTS = ("p2p", "nccl")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to which rank, when it posts which hop."""

    kind: str
    transport: str
    victim: int
    phase: str
    step: int


def faults(pairs: int) -> list[list[Fault]]:
    """For every pair one of each kind, transports, ranks and hops in turn."""
    hops, found = itertools.cycle(HOPS), []
    for pair in range(pairs):
        victim = pair % 2
        found.append(
            [
                Fault(
                    kind,
                    TRANSPORTS[(pair // 2 + i) % len(TRANSPORTS)],
                    (victim + i) % 2,
                    *next(hops),
                )
                for i, kind in enumerate(KINDS)
            ]
        )
    return found


class Pair:
    """One rank of a pair: what it calls, and what it says of it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        torch.cuda.set_device(rank % GPUS)
        if GPUS == 1:
            be_a_host(rank)
        self.plans = [cp.make_plan(T, 2) for T in LENGTHS]
        generator = torch.Generator("cuda").manual_seed(rank)
        self.inputs = [
            [
                torch.randn(1, plan.lengths[rank], heads, 128, device="cuda", dtype=torch.bfloat16,
                            generator=generator).requires_grad_()
                for heads in (8, 2, 2)
            ]
            for plan in self.plans
        ]  # fmt: skip

    def call(self, group: Any, fault: Fault, which: int = 0, timeout: float = TIMEOUT) -> None:
        """Forward and backward."""
        x = self.inputs[which]
        out = ring_attention(
            *x, plan=self.plans[which], group=group, transport=fault.transport, timeout=timeout
        )
        torch.autograd.grad(out, x, torch.ones_like(out))

    def caught(self, group: Any, act: Callable[[], None], calls: int = 1) -> dict[str, Any]:
        """The exception of some calls, and when it came."""
        begin = time.monotonic()
        try:
            for _ in range(calls):
                act()
                cp.synchronize(group)
        except Exception as error:
            torch.cuda.synchronize()
            peers = list(getattr(error, "peers", ()))
            return {
                "error": type(error).__name__, "text": str(error), "peers": peers,
                "rank": getattr(error, "rank", self.rank), "seconds": time.monotonic() - begin,
            }  # fmt: skip
        return {"error": "none", "text": "", "seconds": time.monotonic() - begin}

    def run(self, fault: Fault) -> list[dict[str, Any]]:
        """What this rank saw; of several faults in one run, all."""
        group = dist.new_group(backend="nccl")
        self.call(group, fault, timeout=20.0)
        cp.synchronize(group)
        torch.cuda.synchronize()
        dist.barrier()
        mine = self.rank == fault.victim
        once = lambda: self.call(group, fault)  # noqa: E731
        if fault.kind == "killed":
            if mine:
                _strike(fault, lambda: os.kill(os.getpid(), signal.SIGKILL))
            return [self.caught(group, once, 2)]
        if fault.kind == "delayed":
            if mine:
                _strike(fault, lambda: time.sleep(TIMEOUT + 1))
            return [self.caught(group, once, 1 + mine)]
        if fault.kind == "another length":
            other = dist.new_group(backend="nccl")
            first = self.caught(other, lambda: self.call(other, fault, int(mine), 20.0))
            return [first, self.caught(group, lambda: self.call(group, fault, int(mine)), 2)]
        groups = [group, dist.new_group(backend="nccl")]
        self.call(groups[1], fault, timeout=20.0)
        cp.synchronize(groups[1])
        dist.barrier()
        return self._crossed(groups if self.rank == 0 else groups[::-1], fault)

    def _crossed(self, groups: list[Any], fault: Fault) -> list[dict[str, Any]]:
        """Calls of both groups, then what each of them had to say."""
        found = []
        for group in groups:
            found.append(self.caught(group, lambda g=group: self.call(g, fault)))  # type: ignore[misc]
            if found[-1]["error"] == "none":
                found.pop()
        return found or [{"error": "none", "text": "", "seconds": 0.0}]


def _strike(fault: Fault, what: Callable[[], None]) -> None:
    """Let `what` happen once, when this rank posts the fault's hop."""
    post = device.DeviceTransport.post

    def faulty(self: Any, hop: Any) -> Any:
        if (hop.phase, hop.step) == (fault.phase, fault.step):
            device.DeviceTransport.post = post  # type: ignore[method-assign]
            what()
        return post(self, hop)

    device.DeviceTransport.post = faulty  # type: ignore[method-assign]


def _child(rank: int, port: int, tasks: list[Fault], pipe: Any, stderr: str) -> None:
    descriptor = os.open(stderr, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False,
                          timeout=datetime.timedelta(seconds=60))  # fmt: skip
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        pair = Pair(rank)
        for fault in tasks:
            faulthandler.dump_traceback_later(PATIENCE - 5)
            found = pair.run(fault)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(found)
            if fault.kind != "killed":
                dist.barrier()
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):
            pipe.send([{"error": "harness", "text": text, "seconds": 0.0}])
    os._exit(0)


def right(fault: Fault, rank: int, seen: list[dict[str, Any]]) -> bool:
    """Whether a rank saw what it has to see."""
    if fault.kind == "killed" and rank == fault.victim:
        return [x["error"] for x in seen] == ["died"]
    if fault.kind == "another length":
        refused, seen = seen[:1], seen[1:]
        if [x["error"] for x in refused] != ["ValueError"]:
            return False
        if "different arguments" not in refused[0]["text"]:
            return False
    late = fault.kind == "delayed" and rank == fault.victim
    limit = TIMEOUT + GRACE + (TIMEOUT + 1 if late else 0)
    return bool(seen) and all(
        x["error"] == "RingError" and x["rank"] == rank and x["peers"] == [1 - rank]
        and x["seconds"] < limit for x in seen
    )  # fmt: skip


def live(tasks: list[Fault]) -> list[dict[str, Any]]:
    """A pair's life; one entry for every fault."""
    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logs = [tempfile.mkstemp()[1] for _ in range(2)]
    processes, pipes = [], []
    for rank in range(2):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(
            target=_child, args=(rank, store.port, tasks, send, logs[rank]), daemon=True
        )
        process.start()
        send.close()
        processes.append(process)
        pipes.append(receive)
    entries = []
    for fault in tasks:
        begin, seen = time.monotonic(), []
        for rank, pipe in enumerate(pipes):
            found: list[dict[str, Any]] = [{"error": "hangs", "text": "", "seconds": PATIENCE}]
            with contextlib.suppress(EOFError):
                if pipe.poll(max(0.0, begin + PATIENCE - time.monotonic())):
                    found = [{"error": "died", "text": "", "seconds": 0.0}]
                    found = pipe.recv()
            as_planned = (fault.kind, fault.victim) == ("killed", rank)
            if found[0]["error"] in ("died", "hangs") and not as_planned:
                found[0]["text"] = Path(logs[rank]).read_text()[-4000:]
            seen.append(found)
        good = all(right(fault, rank, seen[rank]) for rank in range(2))
        entries.append({**dataclasses.asdict(fault), "right": good, "seen": seen})
        said = ", ".join(f"{x['error']} {x['seconds']:.1f} s" for s in seen for x in s)
        print(
            f"  {fault.kind}, {fault.transport}: {'right' if good else 'WRONG'}: {said}", flush=True
        )
        if not good and any(x["error"] in ("died", "hangs", "harness") for s in seen for x in s):
            break  # the pair is no more; its other faults have not been tried
    for process in processes:
        process.kill()
        process.join(10)
    return entries


def main(arguments: list[str] | None = None) -> int:
    """Run all pairs, print and write the counts."""
    parser = argparse.ArgumentParser(prog="bench.ring_faults", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=13, help="of processes: so many of each kind")
    parser.add_argument("--at-once", type=int, default=13)
    parser.add_argument("--save", action="store_true", help="beside ring.json")
    parser.add_argument("--path", type=Path, help="and here")
    options = parser.parse_args(arguments)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "lctx_kernels"])
    begin = time.monotonic()
    with ThreadPoolExecutor(options.at_once) as pool:
        entries = [e for one in pool.map(live, faults(options.pairs)) for e in one]
    counts = {}
    for kind, transport in itertools.product(KINDS, TRANSPORTS):
        of_kind = [e for e in entries if (e["kind"], e["transport"]) == (kind, transport)]
        good = sum(e["right"] for e in of_kind)
        slowest = max((x["seconds"] for e in of_kind for s in e["seen"] for x in s), default=0.0)
        counts[f"{kind}, {transport}"] = {"right": good, "of": len(of_kind), "slowest_s": slowest}
        print(f"{kind:20s} {transport:5s} {good} of {len(of_kind)}, slowest {slowest:.2f} s")
    wrong = [e for e in entries if not e["right"]]
    for entry in wrong:
        print(json.dumps(entry)[:12000])
    total = len(entries), len(KINDS) * options.pairs
    print(f"{total[0] - len(wrong)} right, {len(wrong)} wrong, {total[1] - total[0]} not tried, "
          f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    machine = describe_machine("cuda")
    machine["kind"] += "x2" if GPUS == 2 else ""
    document = {
        "machine": machine, "date": datetime.date.today().isoformat(), "timeout_s": TIMEOUT,
        "grace_s": GRACE, "planned": total[1], "run": total[0], "right": total[0] - len(wrong),
        "counts": counts,
        "wrong": [{k: e[k] for k in ("kind", "transport", "victim", "phase")} for e in wrong],
    }  # fmt: skip
    paths = [options.path] if options.path else []
    if options.save:
        paths.append(default_path(machine["kind"], "ring").with_name("ring_faults.json"))
    for path in paths:
        path.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if wrong or total[0] < total[1] else 0


if __name__ == "__main__":
    sys.exit(main())
