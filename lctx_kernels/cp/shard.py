"""From whole tensors to the parts of a plan's ranks, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dtypes import dtype_name, stat_dtype
from .agree import announce_refusal, begin, plan_facts
from .groups import SIM, member, never_compiled
from .plan import Plan, document_bounds


def _check_rank(plan: Plan, rank: int, who: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < plan.world_size:
        raise ValueError(
            f"cp.{who}: rank is {rank!r}; expected 0 ... {plan.world_size - 1}, the plan's ranks"
        )


def _check_length(x: Tensor, dim: int, length: int, who: str, what: str) -> None:
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != length:
        size = x.shape[dim] if -x.dim() <= dim < x.dim() else "no size"
        raise ValueError(
            f"cp.{who}: x has shape {tuple(x.shape)} and {size} at dim = {dim}; expected {length} "
            f"there, {what}"
        )


def _positions(plan: Plan, rank: int) -> Tensor:
    parts = [torch.arange(r.start, r.stop, r.step, device="cpu") for r in plan.ranges[rank]]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device="cpu")


def shard_positions(plan: Plan, rank: int) -> Tensor:
    """Positions of the tokens that `rank` holds, in the order of its rows.

    Args:
        plan: Of `make_plan`.
        rank: 0 ... world_size - 1.

    Returns:
        (L,) int64 on the CPU, for position embeddings.

    Raises:
        ValueError: No such rank.

    >>> from lctx_kernels import cp
    >>> cp.shard_positions(cp.make_plan(8, 2), 0).tolist()
    [0, 1, 6, 7]
    """
    _check_rank(plan, rank, "shard_positions")
    return _positions(plan, rank)


def shard(plan: Plan, x: Tensor, dim: int, rank: int | None) -> Tensor:
    """The part of `x` along `dim` that `rank` holds. Differentiable.

    Args:
        plan: Of `make_plan`.
        x: Tensor with plan.seq_len elements along `dim`.
        dim: Dimension of the sequence.
        rank: 0 ... world_size - 1; None gives the parts of all ranks one after another, which is
            what `ring_attention(..., transport="sim")` takes.

    Returns:
        x with plan.lengths[rank] elements along `dim`.

    Raises:
        ValueError: No such rank, or another length.

    >>> import torch
    >>> from lctx_kernels import cp
    >>> cp.shard(cp.make_plan(8, 2), torch.arange(8), 0, 1).tolist()
    [2, 3, 4, 5]
    """
    if rank is not None:
        _check_rank(plan, rank, "shard")
    _check_length(x, dim, plan.seq_len, "shard", "the plan's whole sequence")
    ranks = range(plan.world_size) if rank is None else [rank]
    runs = [r for rank in ranks for r in plan.ranges[rank]]
    if all(len(r) == 1 or r.step == 1 for r in runs) and len(runs) <= 2 * plan.world_size:
        return torch.cat(
            [x.narrow(dim, 0, 0), *(x.narrow(dim, r.start, len(r)) for r in runs)], dim
        )
    index = torch.cat([_positions(plan, rank) for rank in ranks])
    return x.index_select(dim, index.to(x.device))


class _Exchange(torch.autograd.Function):
    """Rows of every rank, by number, or all, to every rank; the gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor | None, sent: list[int], received: list[int], group: Any
    ) -> Tensor:
        ctx.rows, ctx.sent, ctx.received, ctx.group = rows, sent, received, group
        ctx.length = x.shape[0]
        return _all_to_all(x if rows is None else x[rows], sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        back = _Exchange.apply(grad, None, ctx.received, ctx.sent, ctx.group)  # type: ignore[no-untyped-call]
        if ctx.rows is None:
            return back, None, None, None, None
        # A row that many ranks have: summed in their order, and rounded once.
        total = grad.new_zeros(ctx.length, *grad.shape[1:], dtype=stat_dtype(grad.dtype))
        for rows, part in zip(ctx.rows.split(ctx.sent), back.split(ctx.sent), strict=True):
            total.index_add_(0, rows, part.to(total.dtype))
        return total.to(grad.dtype), None, None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    import torch.distributed as dist

    out = x.new_empty(sum(received), *x.shape[1:])
    there, here = (_rows_of_bytes(t) for t in (out, x.contiguous()))
    dist.all_to_all_single(there, here, received, sent, group=group)
    return out


def _rows_of_bytes(x: Tensor) -> Tensor:
    """A contiguous tensor as (rows, bytes): no group knows every dtype."""
    rows = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return rows.view(torch.uint8)


@never_compiled
def _gather(
    plan: Plan, x: Tensor, dim: int, wanted: Sequence[Tensor], group: Any, who: str,
    note: dict[str, Any],
) -> Tensor:  # fmt: skip
    """x at the positions wanted[rank], from the local parts of all ranks; wanted is every rank's.

    With group = "sim", x holds all parts one after another, and so does the result. `note`: what
    all ranks must have in common besides plan, dtype and the other dimensions.
    """
    n = plan.world_size
    owner, row = plan.places
    if group == SIM:
        offset = torch.tensor([0, *plan.lengths[:-1]], device="cpu").cumsum(0)
        at = torch.cat([offset[owner[w]] + row[w] for w in wanted])
        return x.index_select(dim, at.to(x.device))
    process_group, rank = member(group, n, "cp")
    rest = [size for d, size in enumerate(x.shape) if d != dim % x.dim()]
    begin(process_group, who, x, {
        "dtype": dtype_name(x.dtype), "dim": dim % x.dim(), "other dims": rest,
        **plan_facts(plan), **note,
    })  # fmt: skip
    mine = wanted[rank]
    rows = [row[w[owner[w] == rank]] for w in wanted]
    by_owner = torch.argsort(owner[mine], stable=True)
    received = torch.bincount(owner[mine], minlength=n).tolist()
    moved = _Exchange.apply(  # type: ignore[no-untyped-call]
        x.movedim(dim, 0), torch.cat(rows).to(x.device), [len(r) for r in rows], received,
        process_group,
    )  # fmt: skip
    return moved.index_select(0, torch.argsort(by_owner).to(x.device)).movedim(0, dim)  # type: ignore[no-any-return]


def _check_local(plan: Plan, x: Tensor, dim: int, group: Any, who: str) -> None:
    if group == SIM:
        _check_length(x, dim, plan.seq_len, who, "the parts of all ranks one after another")
        return
    try:
        rank = member(group, plan.world_size, f"cp.{who}")[1]
        _check_length(x, dim, plan.lengths[rank], who, f"what the plan gives rank {rank}")
    except (TypeError, ValueError) as error:
        announce_refusal(f"cp.{who}", (x,), group, error)
        raise


def unshard(plan: Plan, x_local: Tensor, dim: int, group: Any) -> Tensor:
    """The whole of `x_local` along `dim`, on every rank. Differentiable.

    The gradient of a rank's part is the sum of what all ranks' results get.

    Args:
        plan: Of `make_plan`.
        x_local: This rank's part.
        dim: Dimension of the sequence.
        group: ProcessGroup, 1-D DeviceMesh, None for the default group, or "sim": then x_local
            holds the parts of all ranks one after another, and nothing is sent.

    Returns:
        Tensor with plan.seq_len elements along `dim`.

    Raises:
        ValueError: A length that is not the plan's, a group of another size, or ranks that were
            called with different arguments; nothing has been sent then.
        RingError: A rank does not come.

    >>> import torch
    >>> from lctx_kernels import cp
    >>> plan = cp.make_plan(8, 2)
    >>> cp.unshard(plan, cp.shard(plan, torch.arange(8), 0, None), 0, "sim").tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    _check_local(plan, x_local, dim, group, "unshard")
    return whole(plan, x_local, dim, group, "cp.unshard", {})


def whole(
    plan: Plan, x_local: Tensor, dim: int, group: Any, who: str, note: dict[str, Any]
) -> Tensor:
    """As `unshard`, for the call `who`, of which all ranks must say this note, too."""
    return rows_at(plan, x_local, dim, torch.arange(plan.seq_len, device="cpu"), group, who, note)


def rows_at(
    plan: Plan, x_local: Tensor, dim: int, positions: Tensor, group: Any, who: str,
    note: dict[str, Any],
) -> Tensor:  # fmt: skip
    """As `whole`, of the tokens at these positions alone."""
    wanted = [positions] * (1 if group == SIM else plan.world_size)
    return _gather(plan, x_local, dim, wanted, group, who, note)


def roll(plan: Plan, x_local: Tensor, shifts: int, dim: int, group: Any) -> Tensor:
    """`torch.roll` of the whole sequence, from part to part: token p goes to p + shifts.

    Only the rows that are needed travel. Differentiable.

    Args:
        plan: Of `make_plan`.
        x_local: This rank's part.
        shifts: Tokens by which the sequence moves, any sign.
        dim: Dimension of the sequence.
        group: As of `unshard`.

    Returns:
        This rank's part of the rolled sequence.

    Raises:
        ValueError: A length that is not the plan's, a group of another size, or ranks that were
            called with different arguments; nothing has been sent then.
        RingError: A rank does not come.

    >>> import torch
    >>> from lctx_kernels import cp
    >>> plan = cp.make_plan(8, 2)
    >>> x = cp.shard(plan, torch.arange(8), 0, None)
    >>> cp.unshard(plan, cp.roll(plan, x, 1, 0, "sim"), 0, "sim").tolist()
    [7, 0, 1, 2, 3, 4, 5, 6]
    """
    _check_local(plan, x_local, dim, group, "roll")
    length = max(plan.seq_len, 1)
    wanted = [(_positions(plan, rank) - shifts) % length for rank in range(plan.world_size)]
    return _gather(plan, x_local, dim, wanted, group, "cp.roll", {"shifts": shifts % length})


def shift_labels(
    labels: Tensor, *, dim: int = 1, ignore_index: int = -100, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Labels moved one token to the left along `dim`, before sharding.

    After sharding, a rank's next row is not always the next token: shift first, then shard, and
    compare hidden state i with label i.

    Args:
        labels: Tensor of token numbers of the whole sequence.
        dim: Dimension of the sequence.
        ignore_index: Label of the last token, which has none.
        cu_seqlens: (documents + 1,) int32, starts of packed documents: the last token of each has
            no label either.

    Returns:
        Tensor of the shape of `labels`.

    Raises:
        TypeError, ValueError: cu_seqlens that does not fit.

    >>> import torch
    >>> from lctx_kernels import cp
    >>> cp.shift_labels(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    shifted = labels.roll(-1, dim)
    length = labels.shape[dim]
    ends = [length]
    if cu_seqlens is not None:
        ends = document_bounds(cu_seqlens, length, "shift_labels")
    last = torch.tensor([end - 1 for end in ends if end > 0], dtype=torch.int64)
    return shifted.index_fill(dim, last.to(labels.device), ignore_index)
