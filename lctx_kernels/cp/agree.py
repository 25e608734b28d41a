"""What all ranks of a group say alike of a call, before anything of it is sent."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dtypes import dtype_name
from .groups import lacks_backend, member, process_group
from .plan import Plan
from .process_group import GroupTransport
from .registry import transport_of
from .transport import Note, RingError


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What a note says of a plan: what a reader understands, and a sum over all of it."""
    return {
        "sequence length": plan.seq_len, "lengths": list(plan.lengths[:16]), "layout": plan.layout,
        "documents": len(plan.documents) - 1, "plan": zlib.crc32(plan.spec.encode()),
    }  # fmt: skip


def tensor_facts(q: torch.Size, v: torch.Size, dtype: torch.dtype) -> dict[str, Any]:
    """What a note says of q, k, v by the shapes of q and v."""
    return {
        "batch": q[0], "query heads": q[2], "key heads": v[2], "head dims": [q[3], v[3]],
        "dtype": dtype_name(dtype),
    }  # fmt: skip


def begin(
    group: Any, who: str, x: Tensor, note: dict[str, Any], *, remember: bool = True
) -> GroupTransport:
    """The transport of a group at the start of a call on which all ranks agree.

    remember: On GPUs ranks agree once on a note; False has them agree every time.

    Raises:
        TypeError, ValueError: No group, or none for these tensors; or the ranks were called with
            different arguments.
        RingError: A rank does not come.
    """
    group = process_group(group, who)
    if lacking := lacks_backend(group, x.device):
        raise ValueError(f"{who}: {lacking}")
    transport = transport_of(group, x.device)
    said = Note.of({"op": who, **note})
    transport.begin(said, 0.0, agree=True)
    if not remember:
        transport.agreed.discard(said.text)
    return transport


def announce_refusal(who: str, qkv: Sequence[Any], group: Any, error: Exception) -> None:
    """Let ranks that make this call hear of what this one refuses: they would wait for it.

    On CPU tensors alone: on GPUs, where ranks do not agree on every call, nobody may listen.
    """
    x = next((x for x in qkv if isinstance(x, Tensor)), None)
    if torch.compiler.is_compiling() or x is None or x.device.type != "cpu":
        return
    with contextlib.suppress(TypeError, ValueError, RingError):
        members = process_group(group, who)
        if lacks_backend(members, x.device) is None:
            transport_of(members, x.device).announce(str(error))


def rank_of_rows(plan: Plan, q: Tensor, group: Any, who: str) -> int:
    """This rank, whose rows q has; the plan must have rows of consecutive tokens.

    Raises:
        TypeError, ValueError: No group, another plan, or other rows; the other ranks hear of it.
    """
    try:
        rank = member(group, plan.world_size, who)[1]
        if plan.stride != 1 or len(plan.documents) > 2:
            raise ValueError(
                f'{who}: the plan is "{plan.layout}" with {len(plan.documents) - 1} document(s); '
                'expected consecutive tokens and one document; nearest is layout="contiguous"'
            )
        if plan.lengths[rank] != q.shape[1]:
            raise ValueError(
                f"{who}: q has {q.shape[1]} rows on rank {rank}; expected {plan.lengths[rank]}, "
                "what the plan gives it"
            )
    except (TypeError, ValueError) as error:
        announce_refusal(who, (q,), group, error)
        raise
    return rank
