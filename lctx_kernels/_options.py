"""What every option must be, by its name: one check per option, the same for ops and layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ._operands import Call, describe
from .cp.groups import process_group
from .cp.plan import Plan

LARGEST = 2**63 - 1  # that an op takes


def _is_int(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _is_too_large(value: object) -> bool:
    return isinstance(value, int) and value > LARGEST


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
        elif _is_too_large(value):
            call.refuse(ValueError, f"{name} is {value}; expected {expected}, at most {LARGEST}")

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
        elif _is_too_large(value):
            text = f"{name}[{index}] is {value}; expected an int >= 1, at most {LARGEST}"
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


WHOLE_SEQUENCE = "nearest is the whole sequence on one device with group=None, plan=None"


def _group(call: Call, name: str) -> None:
    value, plan = call.arguments[name], call.arguments.get("plan")
    if value is None and plan is None:
        return
    try:
        process_group(value, call.op)
    except (TypeError, ValueError) as error:
        text = str(error).removeprefix(f"{call.op}: ")
        call.refuse(type(error), f"{text}; {WHOLE_SEQUENCE}" if value is None else text)
    if call.arguments["backend"] == "reference":
        call.refuse(
            NotImplementedError,
            'backend is "reference" with a sequence over ranks; expected "auto", "cpu" or "cuda"; '
            f"{WHOLE_SEQUENCE}",
        )
    if call.arguments.get("seqlens") is not None:
        call.refuse(
            NotImplementedError,
            f"seqlens is given with a sequence over ranks; expected None; {WHOLE_SEQUENCE}",
        )


def _plan(call: Call, name: str) -> None:
    value = call.arguments[name]
    if value is None and call.arguments["group"] is not None:
        call.refuse(
            ValueError,
            "group is given without a plan; expected plan=cp.make_plan(seq_len, world_size)",
        )
    elif value is not None and not isinstance(value, Plan):
        call.refuse(TypeError, f"plan is {describe(value)}; expected cp.Plan or None")


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
    "d_model": _integer(1),
    "num_heads": _integer(1),
    "num_kv_heads": _integer(1),
    "head_dim": _integer(1, optional=True),
    "group": _group,
    "plan": _plan,
    "backend": _choice("auto", "cuda", "cpu", "reference"),
}
