#!/usr/bin/env python3
"""Run compute-sanitizer over small calls of every op on the GPU: one line for each tool and op.

Each pair is a process of its own. Inputs come from the host, so that initcheck knows what is
written; PyTorch's caching is off, so that memcheck sees where a tensor ends. Exit code 1 if any
tool finds anything.
"""

import argparse
import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import lctx_kernels as lk  # noqa: E402

TOOLS = ("initcheck", "racecheck", "memcheck", "synccheck")  # the slowest first
TIMEOUT_S = 120
SKIPPED = 3  # exit code of a process whose op has no kernel
HEADLINE = re.compile(r"^========= (?!COMPUTE-SANITIZER|\w+ SUMMARY|Target application)([A-Z].*)")
HEAD_SIZES = (64, 128, 256)
LENGTH = 300  # more blocks than a ring of stages has, the last one incomplete
Tensors = list[torch.Tensor]


class Known(NamedTuple):
    """A kind of finding that is no fault: its tool, calls, and all of the accesses it names."""

    tool: str
    calls: str
    first: str
    others: str


# The first two are of words that all lanes of a warp read before one lane arrives, for the warp, on
# the barrier that lets them be overwritten (docs/hopper_backward.md).
KNOWN = (
    # Row statistics, by the copy engine. Before the arrival stand products, which all lanes have to
    # reach (.sync.aligned) with what they made of the statistics in registers.
    Known(
        "racecheck", r"(flash|landmark|dilated|infini|carry)_bwd_\d+",
        r"Error: Race reported between Write access at lctx::ptx::bulk_load\(",
        r"and Read access at lctx::ptx::load_shared_(float2|4)\(",
    ),
    # Numbers of tiles, where a thread block has many. Before the arrival stands a __syncwarp, which
    # is compiled to a look whether the warp is together.
    Known(
        "racecheck", r"landmark_bwd_\d+",
        r"Error: Race reported between Read access at lctx::ptx::load_shared_4\(",
        r"and Write access at lctx::ptx::store_shared_4\(",
    ),
    # A state that is handed to the warp that publishes it: bar.arrive behind the stores, bar.sync
    # before the loads, PTX's own example of a producer and a consumer. racecheck sees no order.
    Known(
        "racecheck", r"infini(_bwd)?_128|decode_states",
        r"Error: Race reported between Write access at lctx::ptx::store_shared_4\(",
        r"and Read access at lctx::ptx::load_shared_4\(",
    ),
)  # fmt: skip


def qkv(T: int, D: int, *, B: int = 1, Hq: int = 4, Hkv: int = 2, Tq: int | None = None) -> Tensors:
    """q, k, v on the GPU, drawn on the host."""
    torch.manual_seed(0)
    shapes = ((B, T if Tq is None else Tq, Hq, D), (B, T, Hkv, D), (B, T, Hkv, D))
    return [torch.randn(shape).bfloat16().cuda() for shape in shapes]


def leaves(D: int) -> Tensors:
    """q, k, v that want gradients."""
    return [x.requires_grad_() for x in qkv(LENGTH, D)]


@contextmanager
def filled() -> Iterator[None]:
    """Fill what PyTorch allocates: initcheck does not see what the copy engine writes.

    For a forward whose `out` is read again, by the backward or, of a prompt, by PyTorch, and for
    sums of dq that the first to have a part writes. What comes after it is not filled. PyTorch's
    flag fills; an op that asks for it hears no, else every gradient would be deterministic.
    """
    asked = torch.are_deterministic_algorithms_enabled
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.are_deterministic_algorithms_enabled = lambda: False
    try:
        yield
    finally:
        torch.are_deterministic_algorithms_enabled = asked
        torch.use_deterministic_algorithms(False)


def places() -> torch.Tensor:
    """Irregular landmarks."""
    return (torch.arange(LENGTH) % 37 == 5)[None].cuda()


def fp32(*shape: int, value: float = 0.0) -> torch.Tensor:
    """A tensor that kernels add to, filled on the host."""
    return torch.full(shape, value).cuda()


def _flash(D: int) -> None:
    lk.flash_attention(*qkv(LENGTH, D))
    lk.flash_attention(*qkv(LENGTH, D), causal=False, window=40)
    bounds = torch.tensor([0, 70, 70, LENGTH], dtype=torch.int32).cuda()
    lk.flash_attention(*qkv(LENGTH, D), cu_seqlens=bounds)


def _flash_bwd(D: int) -> None:
    for fixed, causal in ((False, True), (False, False), (True, True), (True, False)):
        tensors = leaves(D)
        with filled():
            out = lk.flash_attention(*tensors, causal=causal, deterministic=fixed)
        with filled() if fixed else nullcontext():
            torch.autograd.grad(out.sum(), tensors)


def _decode(D: int) -> None:
    """One token, whose parts are merged at the end, and more rows, which a second kernel merges."""
    for Tq, Hq in ((1, 4), (3, 32)):
        few = qkv(1500, D, Tq=Tq, Hq=Hq, B=2)
        lk.flash_attention(*few)
        lk.landmark_attention(*few, block_size=64)


def _decode_states() -> None:
    from lctx_kernels.cache import InfiniState, RetrievalState, RopeTable

    angle = torch.rand(1, 500, 64).repeat(1, 1, 2)
    rope = RopeTable(torch.cat([angle.cos(), angle.sin()]).cuda())
    q, k, v = qkv(LENGTH, 128, B=2)
    states = [RetrievalState(16, 3, x, offload=x == "token") for x in ("token_and_head", "token")]
    with torch.no_grad():
        for state, options in [*((s, {"rope": rope}) for s in states), (InfiniState(128), {})]:
            with filled():
                state.attend(q, k, v, **options)
            for n in (1, 2, 16):
                state.attend(q[:, :n], k[:, :n], v[:, :n], **options)


def _landmark(D: int) -> None:
    for block_size in (16, 51, 64, 256):
        lk.landmark_attention(*qkv(LENGTH, D), block_size=block_size)
    lk.landmark_attention(*qkv(LENGTH, D), is_landmark=places())


def _landmark_bwd(D: int) -> None:
    options = [{"block_size": n} for n in (51, 64, 100, 256)]
    for where in [*options, {"is_landmark": places()}]:
        for fixed in (False, True):
            tensors = leaves(D)
            with filled():
                out = lk.landmark_attention(*tensors, deterministic=fixed, **where)
            torch.autograd.grad(out.sum(), tensors)


def _dilated(D: int) -> None:
    for causal in (True, False):
        lk.dilated_attention(*qkv(LENGTH, D), [64, 128, LENGTH], [1, 2, 4], causal=causal)
    lk.dilated_attention(*qkv(LENGTH, D), [100], [3])


def _dilated_bwd(D: int) -> None:
    for fixed, mix_grad in ((False, "exact"), (True, "exact"), (False, "detached")):
        tensors, options = leaves(D), {"deterministic": fixed, "mix_grad": mix_grad}
        with filled():
            out = lk.dilated_attention(*tensors, [64, 128, LENGTH], [1, 3, 4], **options)
        torch.autograd.grad(out.sum(), tensors)


def _infini(D: int) -> None:
    for update in ("linear", "delta"):
        _, mem = lk.infini_attention(*qkv(LENGTH, D), segment_len=128, update=update)
        lk.infini_attention(*qkv(100, D), mem, segment_len=128, update=update)


def _infini_bwd(D: int) -> None:
    for update in ("linear", "delta"):
        for fixed in (False, True):
            tensors, options = leaves(D), {"update": update, "deterministic": fixed}
            with filled():
                out, _ = lk.infini_attention(*tensors, segment_len=128, **options)
            out.sum().backward()


def _carry(D: int) -> None:
    """The first two steps of a ring, one after the other and together."""
    (q, k, v), far = qkv(LENGTH, D), qkv(200, D)[1:]
    out, lse = fp32(1, LENGTH, 4, D), fp32(1, 4, LENGTH, value=-torch.inf)
    for keys, start, last in (((k, v), 0, False), (far, LENGTH, True)):
        torch.ops.lctx.flash_carry(q, *keys, out, lse, True, 0.1, 0, LENGTH, start, last)
    for first_row in (0, LENGTH // 2):  # a tile of rows of one kind, and of both
        arguments = (out, lse, torch.empty_like(q), True, 0.1, first_row, LENGTH // 2)
        torch.ops.lctx.flash_carry_two(q, k, v, *far, *arguments)
    some = q[:, :1].contiguous()  # keys are split
    state = fp32(1, 1, 4, D), fp32(1, 4, 1)
    torch.ops.lctx.flash_carry(some, k, v, *state, False, 0.1, 0, 0, 0, False, True)


def _carry_bwd(D: int) -> None:
    q, k, v = qkv(LENGTH, D)
    with filled():
        out, lse = lk.flash_attention(q, k, v, return_lse=True)
    delta = torch.ops.lctx.attn_delta(q, None, out)
    dq, dk, dv = (fp32(*x.shape) for x in (q, k, v))
    for fixed, first in ((False, True), (True, False)):
        torch.ops.lctx.flash_carry_bwd(
            q, q, k, v, lse, delta, dq, dk, dv, True, 0.1, 0, 0, 0, fixed, first
        )
    if D > 128:
        return
    for fixed, begin in ((False, 128), (True, 128 if D <= 64 else 160)):
        late = q[:, begin:]  # behind 37 rows that are no part of the step
        rows, dq_sum = torch.ops.lctx.carry_bwd_begin(q, None, out, lse, fixed)
        for first in (True, False):
            torch.ops.lctx.carry_bwd_step(
                q, q, k, v, rows, dq_sum, dk, dv, True, 0.1, 0, 0, 0, 0, 0, first, 0, fixed
            )
        torch.ops.lctx.carry_bwd_step(
            late, late, k, v, rows, dq_sum, dk, dv, True, 0.1, 0, begin, 0, begin, 0, False, 37,
            fixed,
        )  # fmt: skip
        results = [torch.empty_like(x) for x in (k, v)]
        torch.ops.lctx.carry_bwd_step(
            q, q, k, v, rows, dq_sum, *results, True, 0.1, 0, 0, 0, 0, 0, True, 0, fixed
        )
        torch.ops.lctx.carry_bwd_end(dq_sum, q, 0.1, fixed)


def _merge() -> None:
    out, lse = torch.randn(2, 70, 4, 64).cuda(), torch.randn(2, 4, 70).cuda()
    lk.merge_attention(out, lse, out, lse)


def _planted() -> None:
    memory = torch.empty(1024, device="cuda")
    interface = {"shape": (4096,), "typestr": "<f4", "data": (memory.data_ptr(), False)}
    too_long = SimpleNamespace(__cuda_array_interface__=interface | {"version": 3})
    torch.as_tensor(too_long, device="cuda").sum()


PLANTED = "planted"
FINDERS = ("memcheck", "initcheck")  # of what is planted
BY_HEAD_SIZE = (
    _infini_bwd, _landmark_bwd, _dilated_bwd, _flash_bwd, _carry_bwd, _infini, _landmark, _dilated,
    _flash, _carry, _decode,
)  # fmt: skip
CALLS: dict[str, Callable[[], None]] = {
    f"{f.__name__[1:]}_{D}": partial(f, D) for f in BY_HEAD_SIZE for D in HEAD_SIZES
} | {f.__name__[1:]: f for f in (_decode_states, _merge, _planted)}


def run_calls(op: str) -> int:
    """What runs under the sanitizer."""
    try:
        CALLS[op]()
    except NotImplementedError as error:
        print(error)
        return SKIPPED
    torch.cuda.synchronize()
    return 0


def findings(lines: list[str]) -> list[list[str]]:
    """What a tool reports: headlines, each with the accesses that it names."""
    found: list[list[str]] = []
    for line in lines:
        if match := HEADLINE.match(line):
            found.append([match[1]])
        elif found and (match := re.match(r"^=========     (and .*)", line)):
            found[-1].append(match[1])
    return found


def is_known(tool: str, op: str, finding: list[str]) -> bool:
    """Whether it is of a kind in KNOWN."""
    first, *others = finding
    return any(
        tool == kind.tool
        and re.fullmatch(kind.calls, op)
        and re.match(kind.first, first)
        and others
        and all(re.match(kind.others, x) for x in others)
        for kind in KNOWN
    )


def sanitize(tool: str, op: str, device: str) -> tuple[bool, str]:
    """Whether a tool found nothing, and the line that says so."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "100"]
    command += ["--show-backtrace", "no", sys.executable, __file__, "--op", op]
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_VISIBLE_DEVICES": device}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ | settings
        )
    except subprocess.TimeoutExpired:
        return False, f"{tool:<10} {op:<16} took more than {TIMEOUT_S} s"
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    every = findings(lines)
    found = [", ".join(x) for x in every if not is_known(tool, op, x)]
    what = f"{tool:<10} {op:<16}"
    if op == PLANTED:
        return bool(found), f"{what} {len(found)} findings; at least one was planted"
    if done.returncode == SKIPPED and not found:
        return True, f"{what} skipped: no kernel"
    if done.returncode or found:
        first = found[0] if found else (lines or ["no output"])[-1]
        return False, f"{what} {len(found)} findings, exit code {done.returncode}: {first}"
    known = f" but {len(every)} of known kinds" if every else ""
    return True, f"{what} nothing found{known}, {time.perf_counter() - started:.0f} s"


def visible_devices() -> list[str]:
    """GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def results(tools: list[str], ops: list[str], jobs: int) -> Iterator[tuple[bool, str]]:
    """What `sanitize` says of every pair, as they end, `jobs` processes at a time on all GPUs."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    devices = visible_devices() or ["0"]
    for i in range(jobs):
        free.put(devices[i % len(devices)])

    def on_free_device(tool: str, op: str) -> tuple[bool, str]:
        device = free.get()
        try:
            return sanitize(tool, op, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(jobs) as pool:
        pairs = [(t, op) for t in tools for op in ops if op != PLANTED or t in FINDERS]
        for done in as_completed([pool.submit(on_free_device, *pair) for pair in pairs]):
            yield done.result()


def chosen(ops: str) -> list[str]:
    """Calls by their names, or by those of ops: "flash_bwd" is "flash_bwd_64" and so on."""
    found = []
    for op in ops.split(","):
        named = [n for n in CALLS if n == op or (n.startswith(op) and n[len(op) + 1 :].isdigit())]
        if not named:
            raise SystemExit(f"no op {op!r}; expected some of {', '.join(CALLS)}")
        found += named
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="comma-separated")
    parser.add_argument("--ops", default=",".join(CALLS), help="comma-separated")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time, on all GPUs")
    parser.add_argument("--op", choices=CALLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.op:
        return run_calls(options.op)
    clean = True
    for ok, line in results(options.tools.split(","), chosen(options.ops), options.jobs):
        print(line, flush=True)
        clean &= ok
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
