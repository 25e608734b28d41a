"""Shared by the demo and the benchmark: peak memory of a call, error of a result, safe JSON."""

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def peak_extra_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int | None:
    """Peak bytes in use while `fn()` runs, beyond those before it and those that it returns.

    On a GPU the allocator's own peak; on Linux the peak resident set, reset before the call. None
    elsewhere. Freed memory that the allocator keeps counts as in use: the CPU figure is an upper
    bound.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        if not _reset_peak_resident():
            return None
        before = _status_bytes("VmRSS")
        result = fn()
        peak = _status_bytes("VmHWM")
    return max(0, peak - before - storage_bytes(result))


def storage_bytes(result: Any) -> int:
    """Bytes of the distinct storages behind the tensors of a result (nested tuples, lists)."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(result)
    }
    return sum(storages.values())


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS(actual - expected) / RMS(expected) in fp64; NaN if there is one, 0 for two zeros."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error, size = float((actual - expected).norm()), float(expected.norm())
    return error / size if size > 0 else error


def write_json(path: Path | str, data: Any) -> None:
    """Write `data` as JSON; a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)


def _reset_peak_resident() -> bool:
    """Give freed heap pages back and set the peak resident set to the present one, if possible."""
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
