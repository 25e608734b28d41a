"""Says what this installation is and what it can run: `python -m lctx_kernels.info [--json]`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd")
PACKAGES = ("numpy", "transformers", "accelerate", "triton", "typer", "matplotlib")


def _probe(read: Callable[[], Any]) -> Any:
    """The result of `read`, or the error it met: a broken installation must still be described."""
    try:
        return read()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    model = value.strip()
                if key.strip() in ("flags", "Features"):
                    flags = set(value.split())
    except OSError:
        pass
    return {
        "model": model,
        "cores": os.cpu_count(),
        "features": [name for name in CPU_FEATURES if name in flags],
    }


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda or "none (CPU build)",
        "threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return [
        {
            "name": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
        }
        for device in devices
    ]


def _library() -> dict[str, Any]:
    import torch

    from . import _load

    error = _load.LIBRARY_ERROR
    if error is not None:
        return {"loaded": False, "error": error}
    built: dict[str, Any] = json.loads(torch.ops.lctx.build_info())
    return {"loaded": True, "path": str(_load.LIBRARY)} | built


def _ops() -> dict[str, dict[str, str]]:
    """For each op and backend: "yes", "forward only", or why it cannot run here."""
    from . import _backend, _load
    from ._ops import KERNELS

    error, absent = _load.LIBRARY_ERROR, ""
    gpus, hopper = _probe(_gpus), ".".join(map(str, _backend.CUDA_CAPABILITY))
    if isinstance(gpus, list) and all(gpu["capability"] != hopper for gpu in gpus):
        absent = "no Hopper GPU here" if gpus else "no GPU here"

    def state(op: str, where: str) -> str:
        family = _backend.FAMILY[op]
        if error is not None:
            return "no: the library is not loaded"
        forward = where in KERNELS.get(f"{family}_fwd", ())
        backward = where in KERNELS.get(f"{family}_bwd", ())
        if not forward:
            return "no kernel"
        if where == "cuda" and absent:
            return f"built, {absent}"
        return "yes" if backward and op not in _backend.FORWARD_ONLY else "forward only"

    return {
        op: {"reference": "yes", "cpu": state(op, "cpu"), "cuda": state(op, "cuda")}
        for op in _backend.FAMILY
    }


def collect() -> dict[str, Any]:
    """Everything as one JSON-compatible dictionary; a probe that fails says so in its place.

    >>> from lctx_kernels import info
    >>> sorted(info.collect())
    ['cpu', 'gpus', 'library', 'ops', 'packages', 'python', 'system', 'torch', 'version']
    """
    from ._version import __version__

    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _probe(_cpu),
        "torch": _probe(_torch),
        "gpus": _probe(_gpus),
        "packages": _probe(_installed),
        "library": _probe(_library),
        "ops": _probe(_ops),
    }


def _library_lines(library: Any) -> list[str]:
    if not isinstance(library, dict):
        return [f"kernels: {library}"]
    if not library.get("loaded"):
        return [f"kernels: not loaded: {library.get('error')}"]
    cpu, cuda = library.get("cpu", {}), library.get("cuda", {})
    built = f"built by {library.get('compiler')} with torch {library.get('torch_headers')} headers"
    lines = [
        f"kernels: {library['path']} ({library.get('git') or 'no git revision'}), {built}",
        f"  cpu: {', '.join(cpu.get('isa', []))}; this machine runs {cpu.get('active_isa')}",
    ]
    if cuda.get("built"):
        lines.append(f"  cuda: {', '.join(cuda['archs'])} by nvcc {cuda['nvcc']}")
    else:
        lines.append(f"  cuda: not built: {cuda.get('skipped')}")
    ring = library.get("ring", {})
    state = f"by pybind11 {ring.get('pybind11')}"
    lines.append(
        f"  ring: {state if ring.get('built') else 'not built: ' + str(ring.get('skipped'))}"
    )
    return lines


def render(facts: dict[str, Any]) -> str:
    """`collect()` as text for a terminal."""

    def entries(value: Any) -> str:
        if not isinstance(value, dict):
            return str(value)
        return ", ".join(
            f"{key} {' '.join(item) if isinstance(item, list) else item}"
            for key, item in value.items()
        )

    gpus = facts["gpus"]
    gpu_lines = [f"gpu: {entries(gpu)}" for gpu in gpus] if isinstance(gpus, list) else [str(gpus)]
    lines = [
        f"lctx_kernels {facts['version']}",
        f"python {facts['python']} on {facts['system']}",
        f"cpu: {entries(facts['cpu'])}",
        f"torch: {entries(facts['torch'])}",
        *(gpu_lines or ["gpu: none"]),
        f"packages: {entries(facts['packages'])}",
        *_library_lines(facts["library"]),
    ]
    ops = facts["ops"]
    if not isinstance(ops, dict):
        return "\n".join([*lines, f"ops: {ops}"])
    lines.append(f"{'op':<20}{'reference':<12}{'cpu':<31}{'cuda':<20}")
    lines += [
        f"{op:<20}{row['reference']:<12}{row['cpu']:<31}{row['cuda']:<20}".rstrip()
        for op, row in ops.items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the facts as text, or as JSON with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m lctx_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    facts = collect()
    print(json.dumps(facts, indent=2) if parser.parse_args(arguments).json else render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
