"""Process groups, as the public functions take them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SIM = "sim"
"""Stands for a group whose ranks are all in this process."""


def never_compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, which agrees with other ranks: torch.compile breaks its graph around it."""

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():  # else the compiler, slow to import, is not needed
            return cast(Result, torch.compiler.disable(function)(*args, **kwargs))
        return function(*args, **kwargs)

    return run


class Ranks:
    """The process group of a module: no part of its weights, copies or configuration.

    group: ProcessGroup, 1-D DeviceMesh, or None for the default group.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> Ranks:
        return Ranks(self.group)

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        return Ranks, ()


def process_group(group: Any, who: str) -> Any:
    """The ProcessGroup that `group` (ProcessGroup, 1-D DeviceMesh or None) stands for.

    Raises:
        TypeError: Something else.
        ValueError: A mesh of more dimensions, this process is no member, or no default group.
    """
    import torch.distributed as dist

    if group is None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                f"{who}: group is None and there is no default process group; expected a group, or "
                "torch.distributed.init_process_group() first (torchrun starts the processes)"
            )
        return dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):
        return group
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{who}: group is a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}; "
                'expected one; try mesh["cp"]'
            )
        return group.get_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{who}: this process is not a member of the group")
    raise TypeError(f"{who}: group is {group!r}; expected a ProcessGroup, a 1-D DeviceMesh or None")


def member(group: Any, world_size: int, who: str) -> tuple[Any, int]:
    """The ProcessGroup and this process's rank in it; the group must have world_size ranks.

    Raises:
        TypeError, ValueError: As `process_group`, or a group of another size.
    """
    import torch.distributed as dist

    resolved = process_group(group, who)
    size = dist.get_world_size(resolved)
    if size != world_size:
        raise ValueError(
            f"{who}: the group has {size} ranks, the plan {world_size}; expected equal numbers; "
            f"try make_plan(seq_len, {size})"
        )
    return resolved, dist.get_rank(resolved)


def lacks_backend(group: Any, device: torch.device) -> str | None:
    """Why the group cannot move tensors of this device, if so, and what could."""
    try:
        group._get_backend(device)
    except RuntimeError:
        nearest = "gloo" if device.type == "cpu" else "nccl"
        return (
            f"the group cannot move {device.type} tensors; expected a group with a backend for "
            f'them; try torch.distributed.new_group(backend="{nearest}")'
        )
    return None
