"""What every tensor argument must be: one table of operands, one check that walks it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dtypes import DATA_DTYPES, autocast_dtype, dtype_name, stat_dtype

FIXED_DTYPES = {"int32": torch.int32, "bool": torch.bool}


class Operand(NamedTuple):
    """A tensor argument: its symbolic shape and what decides its dtype."""

    name: str
    shape: tuple[str, ...]
    dtype: str = "data"  # data: that of the first operand; stat: its statistics; or a fixed dtype
    optional: bool = False


class Reason(NamedTuple):
    """One thing wrong with a call, and the exception it deserves."""

    error: type[Exception]
    text: str


class Call:
    """One call under check: the arguments by name and the reasons found so far."""

    def __init__(self, op: str, arguments: dict[str, Any]) -> None:
        self.op = op
        self.arguments = arguments
        self.reasons: list[Reason] = []
        self.sizes: dict[str, tuple[Any, str, int]] = {}  # symbol -> size, operand, dimension

    def refuse(self, error: type[Exception], text: str) -> None:
        self.reasons.append(Reason(error, text))

    def size(self, symbol: str) -> Any:
        """Size bound to a symbol of the operand table, or None when its operand is malformed."""
        return self.sizes[symbol][0] if symbol in self.sizes else None


Q = Operand("q", ("B", "Tq", "Hq", "Dk"))
K = Operand("k", ("B", "Tk", "Hkv", "Dk"))
V = Operand("v", ("B", "Tk", "Hkv", "Dv"))
SAME_LENGTH_QKV = (
    Operand("q", ("B", "T", "Hq", "Dk")),
    Operand("k", ("B", "T", "Hkv", "Dk")),
    Operand("v", ("B", "T", "Hkv", "Dv")),
)
OPERANDS: dict[str, tuple[Operand, ...]] = {
    "flash_attention": (Q, K, V, Operand("cu_seqlens", ("documents + 1",), "int32", True)),
    "infini_attention": (
        *SAME_LENGTH_QKV,
        Operand("mem.M", ("B", "Hkv", "Dk", "Dv"), "stat", True),
        Operand("mem.z", ("B", "Hkv", "Dk"), "stat", True),
        Operand("gate", ("Hq",), "stat", True),
        Operand("q_mem", ("B", "T", "Hq", "Dk"), optional=True),
        Operand("k_mem", ("B", "T", "Hkv", "Dk"), optional=True),
    ),
    "ring_attention": (
        Operand("q", ("B", "L", "Hq", "Dk")),
        Operand("k", ("B", "L", "Hkv", "Dk")),
        Operand("v", ("B", "L", "Hkv", "Dv")),
        Operand("cu_seqlens", ("documents + 1",), "int32", True),
    ),
    "cp.decode_attention": (
        Q,
        Operand("k", ("B", "L", "Hkv", "Dk")),
        Operand("v", ("B", "L", "Hkv", "Dv")),
    ),
    "landmark_attention": (Q, K, V, Operand("is_landmark", ("B", "Tk"), "bool", True)),
    "dilated_attention": (*SAME_LENGTH_QKV, Operand("seqlens", ("B",), "int32", True)),
    "merge_attention": (
        Operand("out_a", ("B", "T", "H", "D")),
        Operand("lse_a", ("B", "H", "T"), "stat"),
        Operand("out_b", ("B", "T", "H", "D")),
        Operand("lse_b", ("B", "H", "T"), "stat"),
    ),
}
LONGEST_REPR = 160  # characters of an argument in an error
AUTOCAST_OPERANDS = ("q", "k", "v", "q_mem", "k_mem")


def describe(value: Any) -> str:
    """A tensor as dtype, shape and device, anything else as its repr, cut if it is long."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {tuple(value.shape)} {value.device}"
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        inside = ", ".join(map(describe, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    text = " ".join(repr(value).split())
    if len(text) <= LONGEST_REPR:
        return text
    return f"{text[:LONGEST_REPR]}... ({type(value).__name__})"


def values_readable(tensor: Tensor) -> bool:
    """Whether reading values costs nothing and is allowed: a real CPU tensor outside of tracing."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _data_dtype(operand: Operand, tensor: Tensor) -> torch.dtype:
    return autocast_dtype(tensor) if operand.name in AUTOCAST_OPERANDS else tensor.dtype


def _check_dtype(call: Call, operand: Operand, tensor: Tensor, data: torch.dtype | None) -> None:
    name, dtype = operand.name, tensor.dtype
    if operand.dtype == "data":
        dtype = _data_dtype(operand, tensor)
        if dtype not in DATA_DTYPES:
            expected = ", ".join(map(dtype_name, DATA_DTYPES))
            nearest = "bfloat16" if dtype.is_floating_point else "float32"
            text = f"{name} is {dtype_name(dtype)}; expected {expected}; nearest is {nearest}"
            call.refuse(TypeError, text)
        elif data is not None and dtype != data:
            call.refuse(
                TypeError,
                f"{name} is {dtype_name(dtype)} but the first tensor is {dtype_name(data)}; "
                f"expected one dtype; try {name}.to(torch.{dtype_name(data)})",
            )
        return
    expected_dtype = FIXED_DTYPES.get(operand.dtype)
    if expected_dtype is None:
        if data is None:
            return
        expected_dtype = stat_dtype(data)
    if dtype != expected_dtype:
        call.refuse(
            TypeError,
            f"{name} is {dtype_name(dtype)}; expected {dtype_name(expected_dtype)}; "
            f"try {name}.to(torch.{dtype_name(expected_dtype)})",
        )


def _check_shape(call: Call, operand: Operand, tensor: Tensor) -> None:
    name, rank = operand.name, len(operand.shape)
    layout = f"({', '.join(operand.shape)})"
    if tensor.dim() != rank:
        call.refuse(ValueError, f"{name} has {tensor.dim()} dimensions; expected {rank}: {layout}")
        return
    for dim, symbol in enumerate(operand.shape):
        size = tensor.shape[dim]
        if symbol not in call.sizes:
            call.sizes[symbol] = (size, name, dim)
        elif size != call.sizes[symbol][0]:
            other_size, other, other_dim = call.sizes[symbol]
            call.refuse(
                ValueError,
                f"{name}.shape[{dim}] is {size} but {other}.shape[{other_dim}] is {other_size}; "
                f"expected equal sizes: both are {symbol}, {name} is {layout}",
            )
    strided = operand.dtype == "data" and tensor.shape[-1] > 1 and tensor.stride(-1) != 1
    if strided and tensor.numel() > 0:
        call.refuse(
            ValueError,
            f"{name} has strides {tuple(tensor.stride())}; expected stride(-1) == 1, the others "
            f"are free; try {name}.contiguous()",
        )


def check_operands(call: Call) -> None:
    """Types, dtypes, devices, ranks, shapes and strides of every tensor, from the operand table."""
    data: torch.dtype | None = None
    device: torch.device | None = None
    for operand in OPERANDS[call.op]:
        tensor = call.arguments[operand.name]
        if tensor is None and operand.optional:
            continue
        if not isinstance(tensor, Tensor):
            call.refuse(TypeError, f"{operand.name} is {describe(tensor)}; expected a torch.Tensor")
            continue
        if tensor.layout != torch.strided:
            text = f"{operand.name} has layout {tensor.layout}; expected a dense tensor"
            if tensor.layout == torch.jagged:
                text += (
                    "; nearest is flash_attention of the rows packed into one, with "
                    f"cu_seqlens={operand.name}.offsets().to(torch.int32)"
                )
            call.refuse(TypeError, text)
            continue
        _check_dtype(call, operand, tensor, data)
        _check_shape(call, operand, tensor)
        if data is None and tensor.dtype in DATA_DTYPES and operand.dtype == "data":
            data = _data_dtype(operand, tensor)
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            call.refuse(
                ValueError,
                f"{operand.name} is on {tensor.device} but the first tensor is on {device}; "
                f"expected one device; try {operand.name}.to({str(device)!r})",
            )
