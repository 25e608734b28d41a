"""Peak memory of every operation beyond its inputs and outputs, at T, 2T and 4T.

One process per operation, so that nothing that another one left behind can be reused unseen. The
backward's saved tensors count; so do copies of q, k, v. Linear means: four times the length, at
most five times the memory.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lctx_kernels._measure import peak_extra_bytes

from .candidates import build, make_inputs
from .machine import ROOT
from .registry import MEMORY_CANDIDATES, OPS, PASSES, Pass, Shape, op_of, op_options
from .results import MemoryRow
from .timing import describe_error

GROWTH_LIMIT = 1.25  # times the growth of the length
NOISE_BYTES = 4 << 20  # thread stacks, page rounding: below this a figure says nothing about growth
TIMEOUT_S = 300


def memory_suite(device: str, lengths: Sequence[int], backend: str = "auto") -> list[MemoryRow]:
    """A row per candidate and pass; a candidate that fails is reported in its row."""
    shape = Shape(T=max(lengths), dtype="bf16" if device == "cuda" else "fp32")
    return [
        measure(candidate, pass_, shape, lengths, device, backend)
        for candidate in MEMORY_CANDIDATES[device]
        for pass_ in PASSES
    ]


def measure(
    candidate: str,
    pass_: Pass,
    shape: Shape,
    lengths: Sequence[int],
    device: str,
    backend: str = "auto",
) -> MemoryRow:
    """Measure one candidate in a process of its own."""
    fields = dataclasses.asdict(shape)
    fields.pop("T")
    row = MemoryRow(candidate, pass_, fields, list(lengths), [], "ok")
    job = {"candidate": candidate, "pass_": pass_, "shape": fields, "lengths": row.lengths,
           "device": device, "backend": backend, "threads": torch.get_num_threads()}  # fmt: skip
    command = [sys.executable, "-m", "bench.memory", json.dumps(job)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        row.status, row.reason = "error", f"took more than {TIMEOUT_S} s"
        return row
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        row.status, row.reason = "error", lines[-1] if lines else f"exit code {done.returncode}"
        return row
    answer = json.loads(done.stdout.splitlines()[-1])
    row.status, row.reason, row.extra_bytes = (
        answer["status"],
        answer["reason"],
        answer["extra_bytes"],
    )
    if row.status == "ok":
        row.growth = growth(row.extra_bytes)
        row.linear = row.growth <= GROWTH_LIMIT * row.lengths[-1] / row.lengths[0]
    return row


def growth(extra_bytes: Sequence[int]) -> float:
    """Last over first, both counted as at least NOISE_BYTES.

    >>> growth([8 << 20, 16 << 20, 32 << 20]), growth([0, 0, 1000])
    (4.0, 1.0)
    """
    return max(extra_bytes[-1], NOISE_BYTES) / max(extra_bytes[0], NOISE_BYTES)


def _work(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    device, candidate = job["device"], job["candidate"]
    op = op_of(candidate)
    kind = "merge" if op == "merge" else "attention"
    options = op_options(candidate, device) if candidate in OPS else {}
    extra: list[int] = []
    try:
        for length in (
            256,
            *job["lengths"],
        ):  # the first is a warm-up: thread pools, code pages, lazy set-up
            inputs = make_inputs(Shape(T=length, **job["shape"]), device, kind)
            peak = peak_extra_bytes(
                build(candidate, inputs, job["pass_"], options, job["backend"]).run, device
            )
            if peak is None:
                return {
                    "status": "unsupported",
                    "reason": "no peak memory on this system",
                    "extra_bytes": [],
                }
            extra.append(peak)
    except NotImplementedError as error:
        return {"status": "unsupported", "reason": describe_error(error), "extra_bytes": []}
    return {"status": "ok", "reason": None, "extra_bytes": extra[1:]}


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.argv[1]))))
