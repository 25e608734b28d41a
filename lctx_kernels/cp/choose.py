"""Which transport a group has."""

from __future__ import annotations

import contextlib
import datetime
import weakref
from typing import Any

import torch

from .device import KINDS, library
from .process_group import GroupTransport, _store
from .registry import known_transport, transport_of
from .transport import RingError


def choose(group: Any, device: torch.device, kind: str, timeout: float = 0.0) -> GroupTransport:
    """The transport of a group that `kind` stands for; made at the first call, by all ranks.

    "auto" is torch.distributed for CPU tensors and for a single rank, else the first that all ranks
    can use of "p2p", "nccl" and "pg".
    """
    if kind == "auto":
        if device.type != "cuda" or group.size() == 1:
            return transport_of(group, device)
        known, chosen = _CHOSEN.get(group.group_name, (None, ""))
        if known is None or known() is not group:
            return _first_that_works(group, device, timeout)
        kind = chosen
    if kind == "pg":
        return transport_of(group, device)

    def make() -> GroupTransport:
        with torch.cuda.device(device):  # of streams and of memory, whatever the current one is
            return KINDS[kind](group, device, timeout)

    return known_transport(group, device, kind, make)


_CHOSEN: dict[str, tuple[weakref.ref[Any], str]] = {}


def _first_that_works(group: Any, device: torch.device, timeout: float) -> GroupTransport:
    if _every_rank_has_the_library(group, timeout):
        for kind in KINDS:
            with contextlib.suppress(NotImplementedError):  # on every rank, as they have agreed
                transport = choose(group, device, kind, timeout)
                _CHOSEN[group.group_name] = weakref.ref(group), kind
                return transport
    _CHOSEN[group.group_name] = weakref.ref(group), "pg"
    return transport_of(group, device)


def _every_rank_has_the_library(group: Any, timeout: float) -> bool:
    try:
        library()
        mine = b"1"
    except NotImplementedError:
        mine = b"0"
    seconds = timeout or transport_of(group, torch.device("cuda")).default_timeout
    store, keys = _store(group), [f"lctx_ring/auto/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], mine)
    with contextlib.suppress(RuntimeError):
        store.wait(keys, datetime.timedelta(seconds=seconds))
        return all(store.get(key) == b"1" for key in keys)
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    raise RingError(
        f"ring_attention: rank {group.rank()} of {group.size()} waited {seconds:g} s to agree on a "
        f"transport with ranks {missing}, which are late or gone",
        rank=group.rank(), step=-1, phase="agreement", peers=tuple(missing), bytes=0,
    )  # fmt: skip
