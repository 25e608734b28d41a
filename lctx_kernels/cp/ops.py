"""`lctx::ring_fwd` and `lctx::ring_bwd`: the whole ring as one op each.

One op is what selective checkpointing can save and what `torch.compile` does not look into. Plan,
group and transport are text, because an op takes no Python objects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _load, _ops
from . import steps
from .agree import plan_facts, tensor_facts
from .choose import choose
from .groups import SIM
from .keys import Rank
from .plan import plan_of
from .schedule import Schedule, schedule_of
from .transport import Note, Simulator, run_alone

NEEDED = {"fwd": ("flash_carry",), "bwd": ("flash_carry_bwd", "attn_delta")}
"""The kernels that each direction is made of."""


class _Options(NamedTuple):
    plan: str
    group: str
    transport: str
    causal: bool
    scale: float
    window: int
    timeout: float
    deterministic: bool

    @property
    def schedule(self) -> Schedule:
        return schedule_of(plan_of(self.plan), self.causal, self.window)


@functools.lru_cache(maxsize=256)
def _note(o: _Options, q: torch.Size, v: torch.Size, dtype: torch.dtype) -> Note:
    """What all ranks must have in common, of shapes of q and v."""
    return Note.of({
        **tensor_facts(q, v, dtype), **plan_facts(plan_of(o.plan)), "causal": o.causal,
        "window": o.window, "scale": o.scale, "deterministic": o.deterministic,
    })  # fmt: skip


def _split(x: Tensor, lengths: tuple[int, ...], dim: int = 1) -> list[Tensor]:
    return list(x.split(list(lengths), dim))


def _ranks(o: _Options) -> tuple[Simulator, list[Rank]]:
    schedule, n = o.schedule, plan_of(o.plan).world_size
    simulator = Simulator(n)
    ranks = [
        Rank(rank, schedule, simulator.rank(rank), o.scale, o.deterministic) for rank in range(n)
    ]
    return simulator, ranks


def _alone(o: _Options, q: Tensor, v: Tensor, agree: bool) -> Rank:
    from torch.distributed import distributed_c10d as c10d

    note = _note(o, q.shape, v.shape, q.dtype)
    group = c10d._resolve_process_group(o.group)  # type: ignore[attr-defined,arg-type]
    transport = choose(group, q.device, o.transport, o.timeout)
    transport.begin(note, o.timeout, agree)
    return Rank(transport.rank, o.schedule, transport, o.scale, o.deterministic)


def _ring_fwd(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    o = _Options(*options)
    if o.transport != SIM:
        at = _alone(o, q, v, agree=True)
        return run_alone(steps.forward(at, q, k, v), at.transport)
    simulator, ranks = _ranks(o)
    lengths = plan_of(o.plan).lengths
    parts = zip(ranks, *(_split(x, lengths) for x in (q, k, v)), strict=True)
    results = simulator.run([steps.forward(*part) for part in parts])
    return torch.cat([out for out, _ in results], 1), torch.cat([lse for _, lse in results], 2)


def _ring_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    o = _Options(*options)
    if o.transport != SIM:
        at = _alone(o, q, v, agree=False)
        work = steps.backward(at, dout, dlse, q, k, v, out, lse)
        return run_alone(work, at.transport)
    simulator, ranks = _ranks(o)
    lengths = plan_of(o.plan).lengths
    rows = [_split(x, lengths) for x in (dout, q, k, v, out)]
    statistics: list[list[Any]] = [
        [None] * len(ranks) if x is None else [s.contiguous() for s in _split(x, lengths, 2)]
        for x in (dlse, lse)
    ]
    douts, qs, ks, vs, outs = rows
    parts = zip(ranks, douts, statistics[0], qs, ks, vs, outs, statistics[1], strict=True)
    results = simulator.run([steps.backward(*part) for part in parts])
    dq, dk, dv = (torch.cat(grads, 1) for grads in zip(*results, strict=True))
    return dq, dk, dv


def _has_kernel(op: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"lctx::{op}", key))


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the GPU of its first tensor as the current one, whose streams it takes."""

    @functools.wraps(function)
    def run(x: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(x.device):
            return function(x, *rest)

    return run


def register() -> None:
    """Implement both ops on every device whose kernels exist; fake kernels and autograd."""
    for direction, function in (("fwd", _ring_fwd), ("bwd", _ring_bwd)):
        for key, made in (("CPU", function), ("CUDA", _on_its_device(function))):
            if all(_has_kernel(op, key) for op in NEEDED[direction]):
                torch.library.impl(f"lctx::ring_{direction}", key)(made)
    _ops.register("ring", (_ops._softmax_fwd, _ops._softmax_bwd))


if _load.LIBRARY_ERROR is None:
    register()
