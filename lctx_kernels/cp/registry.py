"""The transports of all groups of this process, and what they have done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .groups import process_group
from .process_group import GroupTransport

_TRANSPORTS: dict[tuple[str, str, str], GroupTransport] = {}
"""By name of the group, device type and kind."""


def known_transport(
    group: Any, device: torch.device, kind: str, make: Callable[[], GroupTransport]
) -> GroupTransport:
    """The transport of one kind of a group, for tensors of a device.

    One whose making failed half way, on this rank, is given up: the others have come as far or less
    far. NotImplementedError says that all ranks have agreed not to have it.
    """
    key = (group.group_name, device.type, kind)
    known = _TRANSPORTS.get(key)
    if known is None or known.group is not group:
        _forget_destroyed()
        try:
            _TRANSPORTS[key] = known = make()
        except NotImplementedError:
            raise
        except BaseException as error:
            _TRANSPORTS[key] = given_up = GroupTransport(group, device)
            given_up.broken = f"{kind} was not made: {error}".splitlines()[0]
            raise
    return known


def _forget_destroyed() -> None:
    """Let go of groups that were destroyed, unless a late peer may still write to their buffers.

    Transports with memory of their own are kept: their peers may have it mapped.
    """
    from torch.distributed import distributed_c10d

    alive = distributed_c10d._world.pg_map
    for key, transport in list(_TRANSPORTS.items()):
        if key[2] == "pg" and transport.group not in alive and not transport.kept:
            del _TRANSPORTS[key]


def transport_of(group: Any, device: torch.device) -> GroupTransport:
    """The transport of a group by torch.distributed, for tensors of a device."""
    return known_transport(group, device, "pg", lambda: GroupTransport(group, device))


def synchronize(group: Any = None) -> None:
    """Wait until all hops that this rank has posted in a group are done.

    On GPUs a hop that fails is raised by the next call of `ring_attention` or by this function:
    call it where results leave the GPU for good, as before writing a checkpoint.

    Args:
        group: ProcessGroup, 1-D DeviceMesh, or None for the default group.

    Raises:
        RingError: A rank was late, gone, or called with other arguments.
        TypeError, ValueError: Not a group.
    """
    group = process_group(group, "cp.synchronize")
    for transport in list(_TRANSPORTS.values()):
        if transport.group is group:
            transport.synchronize()


def hop_log(group: Any = None) -> list[dict[str, Any]]:
    """What this rank has exchanged in a group, the latest hops last.

    Args:
        group: ProcessGroup, 1-D DeviceMesh, or None for the default group.

    Returns:
        A dictionary for each hop: call, phase, step, part, the ranks in "to" and "from",
        bytes_sent, bytes_received, the times (seconds since 1970) "posted" and "done", and "error".
        A hop that never ended has neither done nor, before its deadline, an error. On GPUs "done"
        is known to some milliseconds, and with transport="pg", where the stream waits and not the
        host, it is None.

    Raises:
        TypeError, ValueError: Not a group.
    """
    group = process_group(group, "cp.hop_log")
    known = [t for t in list(_TRANSPORTS.values()) if t.group is group]
    return [dict(entry) for transport in known for entry in transport.entries()]


def dump_hop_log(path: str | os.PathLike[str], group: Any = None) -> None:
    """Write `hop_log(group)` of this rank to a JSON file, one for each rank.

    Args:
        path: File to write, such as f"hops-{rank}.json".
        group: As of `hop_log`.

    Raises:
        TypeError, ValueError: Not a group.
        OSError: The file cannot be written.
    """
    group = process_group(group, "cp.dump_hop_log")
    facts = {"rank": group.rank(), "world_size": group.size(), "hops": hop_log(group)}
    Path(path).write_text(json.dumps(facts, indent=1))
