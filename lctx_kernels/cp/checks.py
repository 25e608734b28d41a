"""What a call of `ring_attention` must satisfy beyond shapes and dtypes of its tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._operands import Call, describe, values_readable
from .device import KINDS, library
from .groups import SIM, lacks_backend, process_group
from .plan import LAYOUTS, Plan, _spec, document_bounds, plan_of

TRANSPORTS = ("auto", "pg", "p2p", "nccl", SIM)


def _transport(call: Call) -> None:
    value, q = call.arguments["transport"], call.arguments["q"]
    if value not in TRANSPORTS:
        error = ValueError if isinstance(value, str) else TypeError
        expected = ", ".join(TRANSPORTS)
        call.refuse(error, f"transport is {describe(value)}; expected one of {expected}")
    elif value in KINDS and isinstance(q, Tensor) and not torch.compiler.is_compiling():
        if not q.is_cuda:
            call.refuse(
                ValueError,
                f'transport is "{value}", which moves tensors of GPUs, and q is on {q.device}; '
                'expected transport="pg" or "auto"',
            )
            return
        try:
            library()
        except NotImplementedError as error:
            call.refuse(NotImplementedError, f'transport is "{value}": {error}')


def _timeout(call: Call) -> None:
    value = call.arguments["timeout"]
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        call.refuse(TypeError, f"timeout is {describe(value)}; expected seconds > 0 or None")
    elif not (value > 0 and math.isfinite(value)):
        call.refuse(ValueError, f"timeout is {value}; expected seconds > 0 or None")


def _group(call: Call) -> Any:
    """The process group, or None where it is refused or there is none."""
    group = call.arguments["group"]
    if call.arguments["transport"] == SIM:
        if group is not None:
            text = f'group is {group!r} with transport="sim"; expected group=None'
            call.refuse(ValueError, f"{text}: all ranks are in this process")
        if call.arguments["plan"] is None:
            text = 'transport="sim" without a plan; expected plan=cp.make_plan(seq_len, world_size)'
            call.refuse(ValueError, f"{text}, which says how many ranks there are")
        return None
    return _members(call, '; nearest is transport="sim", all ranks in one process')


def _members(call: Call, without: str) -> Any:
    """The process group, or None where it is refused. `without`: what to say where none is."""
    group, device = call.arguments["group"], call.arguments["q"].device
    try:
        resolved = process_group(group, call.op)
    except (TypeError, ValueError) as error:
        text = str(error).removeprefix(f"{call.op}: ")
        call.refuse(type(error), text + (without if group is None else ""))
        return None
    if not torch.compiler.is_compiling() and (lacking := lacks_backend(resolved, device)):
        call.refuse(ValueError, lacking)
        return None
    return resolved


def _plan(call: Call, group: Any) -> None:
    plan, layout = call.arguments["plan"], call.arguments["layout"]
    if plan is not None and not isinstance(plan, Plan):
        call.refuse(TypeError, f"plan is {describe(plan)}; expected cp.Plan or None")
        return
    if plan is None and layout not in LAYOUTS:
        error = ValueError if isinstance(layout, str) else TypeError
        call.refuse(error, f"layout is {describe(layout)}; expected one of {', '.join(LAYOUTS)}")
        return
    L = call.size("L")
    if L is None or (plan is None and group is None):
        return
    if plan is not None and call.arguments["transport"] == SIM:
        if plan.seq_len != L:
            call.refuse(
                ValueError,
                f"q has {L} rows; expected {plan.seq_len}, the rows of all ranks one after another "
                "(cp.shard with rank=None)",
            )
    elif plan is not None and group is not None:
        _local_length(call, plan, group, L)
    seq_len = L * group.size() if plan is None else plan.seq_len
    _documents(call, plan, seq_len)


def _local_length(call: Call, plan: Plan, group: Any, L: Any) -> None:
    n, rank = group.size(), group.rank()
    if plan.world_size != n:
        call.refuse(
            ValueError,
            f"the plan has {plan.world_size} ranks, the group {n}; expected equal numbers; try "
            f"make_plan({plan.seq_len}, {n})",
        )
    elif plan.lengths[rank] != L:
        call.refuse(
            ValueError,
            f"q has {L} rows on rank {rank}; expected {plan.lengths[rank]}: the plan gives its "
            f"ranks {list(plan.lengths)} of {plan.seq_len} tokens (cp.shard cuts them out)",
        )


def _documents(call: Call, plan: Plan | None, seq_len: int) -> None:
    cu_seqlens, B = call.arguments["cu_seqlens"], call.size("B")
    if cu_seqlens is not None and B is not None and B != 1:
        call.refuse(
            ValueError,
            f"cu_seqlens is given with B = {B}; expected B = 1: documents packed into one row; "
            "nearest is cp.make_plan(..., cu_seqlens=...), whose documents all rows have",
        )
    if not isinstance(cu_seqlens, Tensor):
        return
    if not values_readable(cu_seqlens):
        call.refuse(
            ValueError,
            "cu_seqlens is not a plain CPU tensor outside of torch.compile; expected one, or None "
            "and plan=cp.make_plan(..., cu_seqlens=...) made beforehand",
        )
        return
    try:
        bounds = document_bounds(cu_seqlens, seq_len, "ring_attention")
    except (TypeError, ValueError) as error:
        call.refuse(type(error), str(error).removeprefix("ring_attention: "))
        return
    if plan is not None and len(plan.documents) > 2:
        with_these = plan.with_documents(bounds)
        if with_these.documents != plan.documents:
            call.refuse(
                ValueError,
                "cu_seqlens and the plan give different documents; expected equal ones, or one of "
                "the two",
            )


def group_rules(call: Call) -> None:
    """The group of an op that has always one."""
    if isinstance(call.arguments["q"], Tensor):
        _members(call, "")


def ring_rules(call: Call) -> None:
    """Transport, timeout, group, plan and documents."""
    _transport(call)
    _timeout(call)
    if isinstance(call.arguments["q"], Tensor):
        _plan(call, _group(call))


def plan_spec(
    plan: Plan | None, layout: str, seq_len: int, world_size: int, cu_seqlens: Tensor | None
) -> str:
    """The text of the plan that a call stands for, once it has been checked."""
    spec = _spec(layout, seq_len, world_size, None) if plan is None else plan.spec
    if cu_seqlens is None or (plan is not None and len(plan.documents) > 2):  # equal, as checked
        return spec
    return plan_of(spec).with_documents(cu_seqlens.tolist()).spec
