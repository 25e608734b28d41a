"""Small tensors from every rank to every rank, with gradients and with the ring's deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .process_group import GroupTransport
from .transport import Hop


def exchange(transport: GroupTransport, phase: str, outgoing: Sequence[Tensor]) -> list[Tensor]:
    """outgoing[r] to every rank r; what every rank sent here, of the shape of the own one."""
    own = transport.rank
    arrived = [x.contiguous() if r == own else torch.empty_like(outgoing[own].contiguous())
               for r, x in enumerate(outgoing)]  # fmt: skip
    peers = [r for r in range(transport.world_size) if r != own]
    sends = tuple((r, outgoing[r].contiguous().flatten()) for r in peers)
    recvs = tuple((r, arrived[r].view(-1)) for r in peers)
    if peers:
        transport.wait(transport.post(Hop(phase, 0, 0, sends, recvs)))
    return arrived


class _Summed(torch.autograd.Function):
    """The gradient of `_Gathered`, a sum over the ranks. What it sends autograd does not see."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, transport: GroupTransport, phase: str) -> Tensor:
        arrived = exchange(transport, phase, list(grad.unbind()))
        total = arrived[0].clone()
        for part in arrived[1:]:  # in the order of the ranks: deterministic
            total += part
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            "infini_attention over ranks has no double backward; nearest is one rank: "
            "lctx_kernels.reference.infini_attention"
        )


class _Gathered(torch.autograd.Function):
    """x of all ranks. `keep` passes through, so that every rank comes here in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keep: Tensor, transport: GroupTransport, phase: str
    ) -> tuple[Tensor, Tensor]:
        ctx.transport, ctx.phase, ctx.timeout = transport, phase, transport.timeout
        parts = exchange(transport, f"forward {phase}", [x] * transport.world_size)
        return torch.stack(parts), keep.view_as(keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, keep = grads
        ctx.transport.timeout = ctx.timeout  # not that of the group's latest call
        total = _Summed.apply(grad, ctx.transport, f"backward {ctx.phase}")  # type: ignore[no-untyped-call]
        return total, keep, None, None


def gathered(
    transport: GroupTransport, phase: str, x: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor]:
    """(world_size, *x.shape), x of every rank, and `keep`; the gradient of x sums over all ranks.

    Every rank must use `keep` in what it differentiates, so that all take part in the backward.
    """
    result: tuple[Tensor, Tensor] = _Gathered.apply(x, keep, transport, phase)  # type: ignore[no-untyped-call]
    return result
