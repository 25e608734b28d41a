"""What failed rings hold: let go of with nothing under way, freed when no rank can reach it.

A rank that is late may still write to a peer that has given up. So every rank first lets go of what
it has of its peers, and says so by the group's store. Memory is freed when all have said so; else
it is kept, the log says why, and the next transport that is made tries again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .._backend import logger
from .process_group import _store

if TYPE_CHECKING:
    from .device import DeviceTransport

SECONDS = 5.0  # NCCL looks every half second whether a communicator was given up


def _key(ring: DeviceTransport, rank: int) -> str:
    return f"lctx_ring/{ring.kind}/let go/{rank}"


def let_go(rings: Iterable[DeviceTransport]) -> None:
    """Let failed rings go of their peers; all ranks before one of them goes on."""
    failed = [ring for ring in rings if ring.ring.failed]
    for seconds in (0.0, SECONDS):  # they all begin, then they are waited for
        gone = [ring for ring in failed if ring.ring.let_go(seconds)]
    for ring in gone:
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
            _store(ring.group).set(_key(ring, ring.rank), b"1")


def free(rings: Iterable[DeviceTransport]) -> None:
    """Free the failed rings whose ranks have all let go."""
    for ring in rings:
        if not ring.ring.failed:
            continue
        try:
            reason = _who_holds(ring)
            if not reason:
                ring.free()
        except RuntimeError as error:
            reason = str(error)
        if reason:
            logger.warning(
                "ring_attention: rank %d keeps %d bytes of a ring that failed: %s",
                ring.rank, ring.memory_bytes, reason,
            )  # fmt: skip


def _who_holds(ring: DeviceTransport) -> str:
    store = _store(ring.group)
    holders = [r for r in range(ring.world_size) if not store.check([_key(ring, r)])]
    return f"ranks {holders} have not let go of it: they are late, or gone" if holders else ""
