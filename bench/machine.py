"""The machine line: where a number was measured, and the matmul rate of the same process there."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from lctx_kernels.info import collect

from .registry import COPY_BYTES
from .timing import Budget, time_round_robin

ROOT = Path(__file__).resolve().parent.parent
SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "max_sm_clock": "clocks.max.sm",
    "power": "power.limit",
}
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}


def machine_kind(device: torch.device | str) -> str:
    """Name of the results folder: "cpu", or the GPU's name as in "h200"."""
    if torch.device(device).type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe_machine(device: torch.device | str) -> dict[str, Any]:
    """What a reader needs to judge a number: processors, threads, versions, commit, clocks."""
    known = collect()
    cpu = known["cpu"] if isinstance(known["cpu"], dict) else {}
    library = known["library"] if isinstance(known["library"], dict) else {}
    facts: dict[str, Any] = {
        "kind": machine_kind(device),
        "cpu": cpu.get("model", platform.machine()),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "compiler": library.get("compiler"),
        "nvcc": library.get("cuda", {}).get("nvcc"),
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts |= _nvidia_smi(SMI_FIELDS)
    return facts


def machine_line(facts: dict[str, Any]) -> str:
    """One line for tables and plots.

    >>> facts = {"cpu": "Xeon", "isa": "AVX2", "threads": 2, "torch": "2.13", "commit": "abc"}
    >>> machine_line(facts)
    'Xeon, AVX2, 2 threads, torch 2.13, commit abc'
    """
    tail = f"torch {facts['torch']}, commit {facts['commit']}"
    if facts.get("gpu"):
        driver = f"driver {facts.get('driver', '?')}, SM up to {facts.get('max_sm_clock', '?')}"
        return f"{facts['gpu']}, {driver}, CUDA {facts['cuda']}, {tail}"
    return f"{facts['cpu']}, {facts['isa']}, {facts['threads']} threads, {tail}"


def measure_peak(
    device: torch.device | str, dtype: torch.dtype, budget: Budget | None = None
) -> float:
    """FLOP/s of a square matmul (2048 on a CPU, 8192 on a GPU): what percentages refer to."""
    size = PEAK_SIZE[torch.device(device).type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    timing = time_round_robin({"matmul": lambda: a @ b}, device, budget or Budget(seconds=2.0))[
        "matmul"
    ]
    if timing.error:
        raise RuntimeError(f"matmul {size} in {dtype}: {timing.error}")
    return 2 * size**3 / timing.median


def measure_copy(device: torch.device | str, budget: Budget | None = None) -> float:
    """Bytes per second, read and written, of a copy of 4 GiB from device to device."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_round_robin({"copy": lambda: target.copy_(source)}, device, budget)["copy"]
    if timing.error:
        raise RuntimeError(f"copy of {COPY_BYTES} bytes: {timing.error}")
    return 2 * COPY_BYTES / timing.median


def git_commit() -> str:
    """Short hash of the checkout, "+" if tracked files differ from it; "unknown" without git.

    BENCH_COMMIT says it for a copy of a checkout.
    """
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "")


def clocks_now(device: torch.device | str) -> dict[str, str]:
    """The GPU's clock and temperature, read right after a suite; {} on a CPU."""
    if torch.device(device).type != "cuda":
        return {}
    fields = {"sm_clock_after": "clocks.sm", "temperature_after": "temperature.gpu"}
    return _nvidia_smi(fields)


def be_a_host(rank: int) -> None:
    """Let NCCL take this process for a host, so that ranks may share a GPU; it sends by sockets."""
    os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo"}


def _nvidia_smi(fields: dict[str, str]) -> dict[str, str]:
    query = ",".join(fields.values())
    output = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    values = [value.strip() for value in output.splitlines()[0].split(",")] if output else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
