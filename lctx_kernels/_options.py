"""What every option must be, by its name: one check per option, the same for all ops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ._operands import Call, describe


def _is_int(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _integer(minimum: int, optional: bool = False) -> Callable[[Call, str], None]:
    def check(call: Call, name: str) -> None:
        value = call.arguments[name]
        if value is None and optional:
            return
        expected = f"an int >= {minimum}" + (" or None" if optional else "")
        if not _is_int(value):
            call.refuse(TypeError, f"{name} is {describe(value)}; expected {expected}")
        elif value < minimum:
            call.refuse(ValueError, f"{name} is {value}; expected {expected}; nearest is {minimum}")

    return check


def _integers(call: Call, name: str) -> None:
    values = call.arguments[name]
    if not isinstance(values, list | tuple):
        text = f"{name} is {describe(values)}; expected a tuple or list of ints >= 1"
        call.refuse(TypeError, text)
        return
    if len(values) == 0:
        call.refuse(ValueError, f"{name} is empty; expected at least one branch")
    for index, value in enumerate(values):
        if not _is_int(value):
            call.refuse(TypeError, f"{name}[{index}] is {describe(value)}; expected an int >= 1")
        elif value < 1:
            text = f"{name}[{index}] is {value}; expected an int >= 1; nearest is 1"
            call.refuse(ValueError, text)


def _flag(call: Call, name: str) -> None:
    value = call.arguments[name]
    if not isinstance(value, bool):
        call.refuse(TypeError, f"{name} is {describe(value)}; expected True or False")


def _scale(call: Call, name: str) -> None:
    value = call.arguments[name]
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
        call.refuse(TypeError, f"{name} is {describe(value)}; expected a finite number or None")
    elif not math.isfinite(value):
        call.refuse(ValueError, f"{name} is {value}; expected a finite number or None (Dk**-0.5)")


def _choice(*choices: str) -> Callable[[Call, str], None]:
    def check(call: Call, name: str) -> None:
        value = call.arguments[name]
        if value not in choices:
            error = ValueError if isinstance(value, str) else TypeError
            call.refuse(error, f"{name} is {describe(value)}; expected one of {', '.join(choices)}")

    return check


def _context_parallel(call: Call, name: str) -> None:
    if call.arguments[name] is not None:
        call.refuse(
            NotImplementedError,
            f"{name} is given, but context parallelism (lctx_kernels.cp) is not built yet; "
            f"nearest is {name}=None, the whole sequence on one device",
        )


OPTIONS: dict[str, Callable[[Call, str], None]] = {
    "causal": _flag,
    "return_lse": _flag,
    "deterministic": _flag,
    "scale": _scale,
    "window": _integer(1, optional=True),
    "segment_len": _integer(1),
    "detach_every": _integer(0),
    "block_size": _integer(2, optional=True),
    "update": _choice("linear", "delta"),
    "first": _choice("gate", "bypass"),
    "head_offset": _choice("mod", "block"),
    "mix_grad": _choice("exact", "detached"),
    "segment_lengths": _integers,
    "dilation_rates": _integers,
    "group": _context_parallel,
    "plan": _context_parallel,
    "backend": _choice("auto", "cuda", "cpu", "reference"),
}
