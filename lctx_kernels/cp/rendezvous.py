"""What the ranks of a group tell each other by its store while a transport is being made."""

from __future__ import annotations

import collections
import datetime
import time
import weakref
from typing import Any

from .process_group import _store

_ATTEMPTS: weakref.WeakKeyDictionary[Any, collections.Counter[str]] = weakref.WeakKeyDictionary()


class AbsentError(RuntimeError):
    """A rank that said nothing in time."""

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(reason)
        self.peer = peer


class Rendezvous:
    """Rounds in which every rank says something and hears all; each rank takes part in all rounds.

    A store forgets nothing, so no two rounds share keys: those of another attempt to make a
    transport of this kind have others too. All ranks make the same attempts.
    """

    def __init__(self, group: Any, kind: str, rank: int, world_size: int) -> None:
        attempts = _ATTEMPTS.setdefault(group, collections.Counter())
        attempts[kind] += 1
        self.prefix = f"lctx_ring/{kind}/{attempts[kind]}"
        self.store, self.rank, self.world_size = _store(group), rank, world_size
        self.rounds = 0

    def exchange(self, value: bytes, timeout: float) -> list[bytes]:
        """The values of all ranks.

        Raises:
            AbsentError: A rank that is not there after `timeout` seconds.
        """
        self.rounds += 1
        keys = [f"{self.prefix}/{self.rounds}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], value)
        deadline, found = time.monotonic() + timeout, []
        for peer, key in enumerate(keys):
            left = max(deadline - time.monotonic(), 0.001)
            try:
                self.store.wait([key], datetime.timedelta(seconds=left))
                found.append(bytes(self.store.get(key)))
            except RuntimeError as error:
                raise AbsentError(peer, str(error)) from error
        return found
