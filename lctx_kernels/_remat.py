"""What a backward keeps and what it computes again, by the names of the original's options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ._operands import describe
from .checkpoint_policy import checkpoint_policy

_aten = torch.ops.aten
FLAT_DOTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.mv.default,
                       _aten.addmv.default, _aten._scaled_mm.default})  # fmt: skip
"""Matrix products without batch dimensions, as those of linear layers."""
DOTS = FLAT_DOTS | {_aten.bmm.default, _aten.baddbmm.default}


def _save(dots: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in dots:
        return CheckpointPolicy.MUST_SAVE
    return checkpoint_policy(ctx, op, *args, **kwargs)


SAVED: dict[str, Callable[..., CheckpointPolicy]] = {
    "attention_saveable": checkpoint_policy,
    "dots_saveable": functools.partial(_save, DOTS),
    "dots_with_no_batch_dims_saveable": functools.partial(_save, FLAT_DOTS),
}
POLICIES = ("nothing_saveable", "everything_saveable", *SAVED)


def policy_of(who: str, name: str, value: Any) -> str:
    """The policy that an option stands for: one of POLICIES; True saves nothing, False everything.

    Raises:
        TypeError, ValueError: Anything else.
    """
    if isinstance(value, bool):
        return "nothing_saveable" if value else "everything_saveable"
    if value not in POLICIES:
        error = ValueError if isinstance(value, str) else TypeError
        expected = f"True, False or one of {', '.join(POLICIES)}"
        raise error(f"{who}: {name} is {describe(value)}; expected {expected}")
    return str(value)


def run(policy: str, fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """fn(*args, **kwargs), of whose tensors the backward keeps what `policy` saves."""
    if policy == "everything_saveable" or not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    if policy in SAVED:
        kwargs["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, SAVED[policy]
        )
    result: Tensor = checkpoint(fn, *args, use_reentrant=False, **kwargs)
    return result
