"""Which dtypes the ops take, and what autocast makes of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DATA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")  # is_autocast_enabled raises for others, as meta


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and states (lse, M, z, gate) for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of `tensor` after autocast; fp64 stays what it is, as everywhere in PyTorch."""
    if not torch._C._is_any_autocast_enabled():
        return tensor.dtype
    device_type = tensor.device.type
    if (
        tensor.dtype in DATA_DTYPES
        and tensor.dtype != torch.float64
        and device_type in AUTOCAST_DEVICES
        and torch.is_autocast_enabled(device_type)
    ):
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def autocast(tensor: Tensor) -> Tensor:
    """`tensor` in autocast's dtype where autocast is on. For q, k, v; never for fp32 states."""
    dtype = autocast_dtype(tensor)
    return tensor if dtype == tensor.dtype else tensor.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context in which matmuls keep the dtype of their inputs."""
    known = device_type in AUTOCAST_DEVICES
    return torch.autocast(device_type, enabled=False) if known else nullcontext()
