#!/usr/bin/env python3
"""Run compute-sanitizer over small calls of every op on the GPU: one line for each tool and op.

Each pair is a process of its own. Inputs come from the host, so that initcheck knows what is
written; PyTorch's caching is off, so that memcheck sees where a tensor ends. Exit code 1 if any
tool finds anything.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import lctx_kernels as lk  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TIMEOUT_S = 240
SKIPPED = 3  # exit code of a process whose op has no kernel
HEADLINE = re.compile(r"^========= (?!COMPUTE-SANITIZER|\w+ SUMMARY|Target application)([A-Z].*)")


def qkv(T: int, D: int, *, B: int = 1, Hq: int = 4, Hkv: int = 2, Tq: int | None = None):
    """q, k, v on the GPU, drawn on the host."""
    torch.manual_seed(0)
    shapes = ((B, T if Tq is None else Tq, Hq, D), (B, T, Hkv, D), (B, T, Hkv, D))
    return [torch.randn(shape).bfloat16().cuda() for shape in shapes]


def leaves(T: int, D: int) -> list[torch.Tensor]:
    """q, k, v that want gradients."""
    return [x.requires_grad_() for x in qkv(T, D)]


def _flash() -> None:
    for D in (64, 128, 256):
        lk.flash_attention(*qkv(300, D))
    lk.flash_attention(*qkv(300, 64), causal=False, window=40)
    bounds = torch.tensor([0, 70, 70, 300], dtype=torch.int32).cuda()
    lk.flash_attention(*qkv(300, 64), cu_seqlens=bounds)


def _flash_bwd() -> None:
    for D in (64, 128, 256):
        for fixed, causal in ((False, True), (False, False), (True, True)):
            tensors = leaves(300, D)
            out = lk.flash_attention(*tensors, causal=causal, deterministic=fixed)
            torch.autograd.grad(out.sum(), tensors)


def _decode() -> None:
    lk.flash_attention(*qkv(1500, 128, Tq=1, B=2))


def _decode_states() -> None:
    from lctx_kernels.cache import InfiniState, RetrievalState, RopeTable

    angle = torch.rand(1, 500, 64).repeat(1, 1, 2)
    rope = RopeTable(torch.cat([angle.cos(), angle.sin()]).cuda())
    q, k, v = qkv(300, 128, B=2)
    states = [RetrievalState(16, 3, x, offload=x == "token") for x in ("token_and_head", "token")]
    with torch.no_grad():
        for state, options in [*((s, {"rope": rope}) for s in states), (InfiniState(128), {})]:
            state.attend(q, k, v, **options)
            for n in (1, 2, 16):
                state.attend(q[:, :n], k[:, :n], v[:, :n], **options)


def _landmark() -> None:
    for D, block_size in ((64, 64), (128, 51), (128, 256)):
        lk.landmark_attention(*qkv(300, D), block_size=block_size)
    places = (torch.arange(300) % 37 == 5)[None].cuda()
    lk.landmark_attention(*qkv(300, 64), is_landmark=places)


def _landmark_bwd() -> None:
    places = (torch.arange(300) % 37 == 5)[None].cuda()
    blocks = ((64, 64), (64, 100), (64, None), (128, 51), (128, 64), (128, 256))
    for fixed in (False, True):
        for D, block_size in (*blocks, (256, 64), (256, None)):
            where = {"block_size": block_size} if block_size else {"is_landmark": places}
            tensors = leaves(300, D)
            out = lk.landmark_attention(*tensors, deterministic=fixed, **where)
            torch.autograd.grad(out.sum(), tensors)


def _dilated() -> None:
    for causal in (True, False):
        lk.dilated_attention(*qkv(300, 64), [64, 128, 300], [1, 2, 4], causal=causal)
    lk.dilated_attention(*qkv(300, 128), [100], [3])


def _dilated_bwd() -> None:
    for D, rates in ((64, [1, 2, 4]), (128, [1, 3, 4]), (256, [2, 3, 4])):
        for fixed, mix_grad in ((False, "exact"), (True, "exact"), (False, "detached")):
            tensors, options = leaves(300, D), {"deterministic": fixed, "mix_grad": mix_grad}
            out = lk.dilated_attention(*tensors, [64, 128, 300], rates, **options)
            torch.autograd.grad(out.sum(), tensors)


def _infini() -> None:
    for D in (64, 128):
        for update in ("linear", "delta"):
            _, mem = lk.infini_attention(*qkv(300, D), segment_len=128, update=update)
            lk.infini_attention(*qkv(100, D), mem, segment_len=128, update=update)


def _infini_bwd() -> None:
    for D in (64, 128, 256):
        for update in ("linear", "delta"):
            tensors = leaves(300, D)
            for fixed in (False, True):
                out, _ = lk.infini_attention(
                    *tensors, segment_len=128, update=update, deterministic=fixed
                )
                out.sum().backward()


def _carry() -> None:
    q, k, v = qkv(300, 128)
    out, lse = torch.zeros(1, 300, 4, 128).cuda(), torch.full((1, 4, 300), -torch.inf).cuda()
    for start, last in ((0, False), (300, True)):
        torch.ops.lctx.flash_carry(q, k, v, out, lse, True, 0.1, 0, 300, start, last)


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
OPS = (
    _planted, _flash, _flash_bwd, _decode, _decode_states, _landmark, _landmark_bwd, _dilated,
    _dilated_bwd, _infini, _infini_bwd, _carry, _merge,
)  # fmt: skip
CALLS: dict[str, Callable[[], None]] = {f.__name__[1:]: f for f in OPS}


def run_calls(op: str) -> int:
    """What runs under the sanitizer."""
    try:
        CALLS[op]()
    except NotImplementedError as error:
        print(error)
        return SKIPPED
    torch.cuda.synchronize()
    return 0


def sanitize(tool: str, op: str) -> tuple[bool, str]:
    """Whether a tool found nothing, and the line that says so."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "5"]
    command += [sys.executable, __file__, "--op", op]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"{tool:<10} {op:<12} took more than {TIMEOUT_S} s"
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    found = [match[1] for line in lines if (match := HEADLINE.match(line))]
    what = f"{tool:<10} {op:<12}"
    if op == PLANTED:
        return bool(found), f"{what} {len(found)} findings; at least one was planted"
    if done.returncode == SKIPPED and not found:
        return True, f"{what} skipped: no kernel"
    if done.returncode or found:
        first = found[0] if found else (lines or ["no output"])[-1]
        return False, f"{what} {len(found)} findings, exit code {done.returncode}: {first}"
    return True, f"{what} nothing found, {time.perf_counter() - started:.0f} s"


def results(tools: list[str], ops: list[str], jobs: int) -> Iterator[tuple[bool, str]]:
    """What `sanitize` says of every pair, as they end, `jobs` processes at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        pairs = [(t, op) for op in ops for t in tools if op != PLANTED or t in FINDERS]
        for done in as_completed([pool.submit(sanitize, *pair) for pair in pairs]):
            yield done.result()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="comma-separated")
    parser.add_argument("--ops", default=",".join(CALLS), help="comma-separated")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--op", choices=CALLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.op:
        return run_calls(options.op)
    clean = True
    for ok, line in results(options.tools.split(","), options.ops.split(","), options.jobs):
        print(line, flush=True)
        clean &= ok
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
