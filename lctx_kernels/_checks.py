"""What every call must satisfy; all reasons against it are collected before anything runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._dtypes import autocast_dtype
from ._operands import OPERANDS, Call, Reason, check_operands, describe, values_readable
from ._options import OPTIONS
from .cp.checks import group_rules, ring_rules
from .cp.groups import SIM, process_group


def _heads(call: Call) -> None:
    Hq, Hkv = call.size("Hq"), call.size("Hkv")
    if Hq is None or Hkv is None:
        return
    if Hkv < 1 or Hq < 1:
        call.refuse(ValueError, f"q has {Hq} heads, k and v have {Hkv}; expected at least 1")
    elif Hq % Hkv != 0:
        call.refuse(
            ValueError,
            f"q has {Hq} heads, k and v have {Hkv}; expected Hq to be a multiple of Hkv; "
            f"nearest is Hq = {max(Hq // Hkv, 1) * Hkv}",
        )


def _head_dims(call: Call) -> None:
    for symbol in ("Dk", "Dv", "D"):
        size = call.size(symbol)
        if size is not None and size < 1:
            call.refuse(ValueError, f"{symbol} is {size}; expected a head dimension of at least 1")


def _documents(call: Call) -> None:
    cu_seqlens = call.arguments["cu_seqlens"]
    if not isinstance(cu_seqlens, Tensor) or call.size("documents + 1") is None:
        return
    B, Tq, Tk = call.size("B"), call.size("Tq"), call.size("Tk")
    if B is None or Tk is None:
        return
    if B != 1 or Tq != Tk:
        call.refuse(
            ValueError,
            f"cu_seqlens is given with B = {B}, Tq = {Tq}, Tk = {Tk}; expected B = 1 and Tq = Tk: "
            "documents packed into one row",
        )
    if cu_seqlens.shape[0] == 0:
        call.refuse(ValueError, f"cu_seqlens is empty; expected 0, ends of documents, {Tk}")
    elif values_readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != Tk or bounds != sorted(bounds):
            shown = bounds if len(bounds) <= 8 else f"[{bounds[0]}, ..., {bounds[-1]}]"
            call.refuse(
                ValueError,
                f"cu_seqlens is {shown}; expected it to start at 0, never decrease, and end at "
                f"T = {Tk}",
            )


def _landmarks(call: Call) -> None:
    given = [n for n in ("block_size", "is_landmark") if call.arguments[n] is not None]
    if len(given) != 1:
        call.refuse(
            ValueError,
            f"{'both' if given else 'neither'} of block_size and is_landmark given; expected "
            "exactly one; try block_size=64",
        )


def _branches(call: Call) -> None:
    lengths, rates = call.arguments["segment_lengths"], call.arguments["dilation_rates"]
    sized = isinstance(lengths, list | tuple) and isinstance(rates, list | tuple)
    if sized and len(lengths) != len(rates):
        call.refuse(
            ValueError,
            f"segment_lengths has {len(lengths)} entries, dilation_rates has {len(rates)}; "
            "expected one of each per branch",
        )


def _true_lengths(call: Call) -> None:
    seqlens, T = call.arguments["seqlens"], call.size("T")
    if not isinstance(seqlens, Tensor) or T is None or not values_readable(seqlens):
        return
    lengths = seqlens.flatten().tolist()
    if any(not 0 <= length <= T for length in lengths):
        shown = lengths if len(lengths) <= 8 else f"in [{min(lengths)}, {max(lengths)}]"
        call.refuse(ValueError, f"seqlens is {shown}; expected lengths from 0 to T = {T}")


def _memory(call: Call) -> None:
    mem = call.arguments["mem"]
    call.arguments["mem.M"], call.arguments["mem.z"] = None, None
    if isinstance(mem, list | tuple) and len(mem) == 2:
        call.arguments["mem.M"], call.arguments["mem.z"] = mem
        if (mem[0] is None) != (mem[1] is None) or mem[0] is None:
            call.refuse(TypeError, "mem holds None; expected InfiniMemory(M, z) or mem=None")
    elif mem is not None:
        call.refuse(TypeError, f"mem is {describe(mem)}; expected InfiniMemory(M, z) or None")


def _available(call: Call) -> None:
    backend = call.arguments.get("backend", "auto")
    tensors = [call.arguments[operand.name] for operand in OPERANDS[call.op]]
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if not tensors or backend not in ("auto", "cpu", "cuda"):
        return
    device = tensors[0].device
    if backend != "auto" and device.type not in (backend, "meta"):
        call.refuse(
            ValueError,
            f'backend="{backend}" with tensors on {device}; expected {backend} tensors; nearest is '
            'backend="auto"',
        )
        return
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    text = _backend.unavailable(call.op, _backend.resolve(backend, device.type), device, needs_grad)
    if text is not None:
        call.refuse(NotImplementedError, text)
    elif call.op in HOPPER_OPS and _backend.resolve(backend, device.type) == "cuda":
        _hopper_limits(call)


def _hopper_limits(call: Call) -> None:
    """What the TMA kernels take beyond the checks of every backend."""
    q, Dk, Dv = call.arguments["q"], call.size("Dk"), call.size("Dv")
    nearest = f"nearest is {_backend.reference_of(call.op)}"
    dtype = autocast_dtype(q) if isinstance(q, Tensor) else torch.float16  # refused elsewhere
    if dtype not in (torch.bfloat16, torch.float16):
        call.refuse(
            NotImplementedError,
            f"q, k and v are {dtype} on a GPU; expected torch.bfloat16 or torch.float16; {nearest}",
        )
    if Dk is not None and (Dk != Dv or Dk % 8 != 0 or Dk > 256):
        call.refuse(
            NotImplementedError,
            f"the head dimensions are Dk = {Dk}, Dv = {Dv} on a GPU; expected Dk = Dv, a multiple "
            f"of 8, at most 256; {nearest}",
        )
    scale = call.arguments["scale"]
    if isinstance(scale, float | int) and scale <= 0:
        call.refuse(
            NotImplementedError, f"scale is {scale} on a GPU; expected a positive number; {nearest}"
        )
    for name in ("q", "k", "v", "q_mem", "k_mem"):
        x = call.arguments.get(name)
        if not isinstance(x, Tensor) or x.dim() != 4:
            continue
        used = [
            stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1
        ]
        if any(stride <= 0 or stride % 8 != 0 for stride in used):
            call.refuse(
                NotImplementedError,
                f"{name} has strides {tuple(x.stride())} on a GPU; expected multiples of 8 "
                f"elements (16 bytes) in the outer dimensions; nearest is {name}.contiguous()",
            )


HOPPER_OPS = (
    "flash_attention",
    "infini_attention",
    "landmark_attention",
    "dilated_attention",
    "ring_attention",
    "cp.decode_attention",
)
OVER_RANKS = ("ring_attention", "cp.decode_attention")  # always; the others where a group is given
RULES: dict[str, tuple[Callable[[Call], None], ...]] = {
    "flash_attention": (check_operands, _heads, _head_dims, _documents),
    "infini_attention": (_memory, check_operands, _heads, _head_dims),
    "landmark_attention": (check_operands, _heads, _head_dims, _landmarks),
    "dilated_attention": (check_operands, _heads, _head_dims, _branches, _true_lengths),
    "merge_attention": (check_operands, _head_dims),
    "ring_attention": (check_operands, _heads, _head_dims, ring_rules),
    "cp.decode_attention": (check_operands, _heads, _head_dims, group_rules),
}


def reasons(op: str, arguments: dict[str, Any]) -> list[Reason]:
    """Every reason why `op` refuses `arguments` (all arguments of its signature, by name)."""
    call = Call(op, dict(arguments))
    for rule in RULES[op]:
        rule(call)
    for name in arguments:
        if name in OPTIONS and (op not in OVER_RANKS or name not in ("group", "plan")):
            OPTIONS[name](call, name)
    _available(call)
    return call.reasons


def error(op: str, arguments: dict[str, Any], found: list[Reason]) -> Exception:
    """The exception with all reasons and arguments; a wrong type outranks a wrong value."""
    kinds = [reason.error for reason in found]
    kind = next(k for k in (TypeError, ValueError, NotImplementedError) if k in kinds)
    given = ", ".join(f"{name}={describe(value)}" for name, value in arguments.items())
    lines = "".join(f"\n  - {reason.text}" for reason in found)
    return kind(f"{op} cannot run:{lines}\ngiven: {given}")


def require_options(who: str, **options: Any) -> None:
    """Raise with all reasons if `who`, a layer, could not hand these options to its op."""
    call = Call(who, options)
    for name in options:
        OPTIONS[name](call, name)
    if call.reasons:
        raise error(who, options, call.reasons)


PLAIN = frozenset({str, int, float, bool, type(None)})
TENSORS = frozenset({Tensor, torch.nn.Parameter})
MOST_ACCEPTED = 1024
_accepted: dict[tuple[Any, ...], str] = {}  # calls that the rules have passed, and their backends


def _trait(value: Any) -> Any:
    """What rules read of an argument, with its type, as True == 1; a thing of its own is itself."""
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind in TENSORS:
        device = value.device
        values = device.type == "cpu" and not value.dtype.is_floating_point
        if values or value.layout != torch.strided:
            raise TypeError  # rules read its values, or more than this
        return value.shape, value.stride(), value.dtype, device, value.requires_grad
    if isinstance(value, list | tuple):
        return kind, tuple(map(_trait, value))
    if isinstance(value, Tensor):
        raise TypeError  # it decides for itself what is true of it
    return weakref.ref(value)


def _key(op: str, arguments: dict[str, Any]) -> tuple[Any, ...] | None:
    """All that the rules of a call depend on; None where that is more than its arguments' traits.

    An equal key is an equal verdict, which spares a call most of the host's time for its checks.
    """
    first = arguments[OPERANDS[op][0].name]
    if torch.compiler.is_compiling() or not isinstance(first, Tensor):
        return None
    lower = autocast_dtype(first) if torch._C._is_any_autocast_enabled() else None
    try:
        group: Any = ()
        if op in OVER_RANKS and arguments.get("transport") != SIM:
            group = weakref.ref(process_group(arguments["group"], op))  # None is the default's
        elif arguments.get("plan") is not None or arguments.get("group") is not None:
            return None
        return (op, torch.is_grad_enabled(), lower, group, *map(_trait, arguments.values()))
    except (TypeError, ValueError):
        return None  # nothing to remember


def require(op: str, **arguments: Any) -> str:
    """Raise with all reasons if `op` refuses these arguments; else the backend that serves them."""
    key = _key(op, arguments)
    where = None if key is None else _accepted.get(key)
    if where is None:
        found = reasons(op, arguments)
        if found:
            raise error(op, arguments, found)
        device = arguments[OPERANDS[op][0].name].device
        where = _backend.resolve(arguments.get("backend", "auto"), device.type)
        if key is not None:
            if len(_accepted) >= MOST_ACCEPTED:
                _accepted.clear()
            _accepted[key] = where
    if _backend.LOG and not torch.compiler.is_compiling():
        given = ", ".join(f"{name}={describe(value)}" for name, value in arguments.items())
        _backend.logger.info("%s on %s: %s", op, where, given)
    return where
