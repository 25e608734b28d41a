"""Context parallelism: which rank holds which tokens of one long sequence. Not built yet."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

__all__ = ["Plan", "make_plan", "shard", "shard_positions", "shift_labels", "unshard"]


def _missing(name: str) -> NoReturn:
    raise NotImplementedError(
        f"cp.{name}: context-parallel plans are not built yet; nearest is the whole sequence on "
        "one device with group=None, plan=None"
    )


class Plan:
    """Which positions of a sequence each rank holds, in which order. Made by `make_plan`."""

    def __init__(self) -> None:
        _missing("Plan")


def make_plan(
    seq_len: int,
    world_size: int,
    *,
    layout: str = "zigzag",
    cu_seqlens: Tensor | None = None,
    positions: list[Tensor] | None = None,
) -> Plan:
    """Plan for `seq_len` tokens (any number) over `world_size` ranks. Not built yet.

    Raises:
        NotImplementedError: Always, today.

    >>> from lctx_kernels import cp
    >>> cp.make_plan(1000, 4)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    NotImplementedError: cp.make_plan: context-parallel plans are not built yet; ...
    """
    _missing("make_plan")


def shard(plan: Plan, x: Tensor, dim: int, rank: int) -> Tensor:
    """The part of `x` along `dim` that `rank` holds; differentiable. Not built yet.

    Raises:
        NotImplementedError: Always, today.
    """
    _missing("shard")


def unshard(plan: Plan, x_local: Tensor, dim: int, group: Any) -> Tensor:
    """The whole of `x_local` along `dim`, gathered over `group`; differentiable. Not built yet.

    Raises:
        NotImplementedError: Always, today.
    """
    _missing("unshard")


def shard_positions(plan: Plan, rank: int) -> Tensor:
    """(L,) int64 positions of the tokens that `rank` holds. Not built yet.

    Raises:
        NotImplementedError: Always, today.
    """
    _missing("shard_positions")


def shift_labels(labels: Tensor, *, dim: int = 1, ignore_index: int = -100) -> Tensor:
    """Labels moved one token to the left along `dim`, before sharding. Not built yet.

    Raises:
        NotImplementedError: Always, today.
    """
    _missing("shift_labels")
