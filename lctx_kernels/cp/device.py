"""Shards between GPUs by this package's own communicators: "p2p" and "nccl".

Nothing waits on the host. Hops use memory that is made once for a group, on streams of their own,
and a watchdog looks after every one of them. What ranks must tell each other goes by the group's
store.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import socket
import sys
import time
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import failed
from .process_group import GroupTransport, Ticket
from .rendezvous import AbsentError, Rendezvous
from .transport import Hop, Note, RingError

PHASES = ("forward kv", "backward kv", "backward dkv")
CODES = {phase: code for code, phase in enumerate(PHASES)}
LANE_PRIORITIES = (-2, -1)  # above the caller's, below those of hops
CHANNELS_WANTED = 8  # NCCL's blocks for a hop; registered, each moves 40 GB/s both ways


def library() -> ModuleType:
    """The compiled communicators.

    Raises:
        NotImplementedError: They are not built for this Python, or there is no CUDA driver.
    """
    try:
        from .. import _ring
    except ImportError as error:
        raise NotImplementedError(
            f"lctx_kernels._ring is not built for this Python ({error}); install pybind11 and the "
            'CUDA toolkit and build again; nearest is transport="pg"'
        ) from error
    try:
        _ring.open_driver()
    except RuntimeError as error:
        raise NotImplementedError(f'{error}; nearest is transport="pg"') from error
    return _ring


class DeviceTransport(GroupTransport):
    """The hops of one rank on a GPU. One for each group and kind, made at its first call."""

    kind: str
    ring: Any

    def __init__(self, group: Any, device: torch.device, timeout: float = 0.0) -> None:
        super().__init__(group, device)
        self.timeout = timeout or self.default_timeout
        self.module = library()
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.size = 0
        self.bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self.rendezvous = Rendezvous(group, self.kind, self.rank, self.world_size)
        self.stream = -1  # that the last call was on; -1 before the first
        _OPEN.add(self)

    # ---- what ranks tell each other ----

    def _exchange(self, what: str, value: bytes) -> list[bytes]:
        """The values of all ranks, by the store; every rank calls it the same number of times."""
        deadline = time.monotonic() + self.timeout
        try:
            return self.rendezvous.exchange(value, self.timeout)
        except AbsentError as error:
            hop = Hop("agreement", -1, 0, ((error.peer, self.bytes[:0]),), ())
            ticket = Ticket(hop, [], deadline, {})
            raise self._failure(ticket, f"to {what} with", error.peer, error) from error

    def _exchange_notes(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        text = json.dumps(note).encode()
        return [json.loads(n) for n in self._exchange("agree", text)]

    def _all_succeed(self, what: str, succeeded: bool) -> bool:
        """Whether it is so on every rank."""
        return all(n == b"1" for n in self._exchange(what, b"1" if succeeded else b"0"))

    @functools.cached_property
    def _post(self) -> Any:
        return self.ring.post

    def free(self) -> None:
        """End a failed transport that no rank can reach any more, and free its memory."""
        self.bytes, self.size = self.bytes[:0].clone(), 0
        self.ring.free_memory()
        self.ring.close()
        _OPEN.discard(self)

    # ---- memory ----

    @property
    def memory_bytes(self) -> int:
        """As GroupTransport."""
        return self.size

    def memory(self, size: int, device: torch.device) -> Tensor:
        """As Transport. Grows, never shrinks; all ranks ask for the same."""
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        if self.stream not in (stream, -1):  # the memory is still in use there
            before = (
                torch.cuda.ExternalStream(self.stream, device=device) if self.stream
                else torch.cuda.default_stream(device)
            )  # fmt: skip
            torch.cuda.current_stream(device).wait_stream(before)
        self.stream = stream
        if size > self.size:
            self._grow(size)
        return self.bytes[:size]

    def _grow(self, size: int) -> None:
        with contextlib.suppress(RuntimeError):
            self.ring.synchronize()
        torch.cuda.synchronize(self.device)
        self.bytes, self.size = self.bytes[:0].clone(), 0
        self._give_back()
        problem = ""
        for _ in range(2):
            try:
                self._allocate(size)
                problem = ""
                break
            except RuntimeError as error:
                problem = str(error)
                torch.cuda.empty_cache()  # what torch keeps for itself may be all there is
        if not self._all_succeed("make memory", not problem):
            raise torch.OutOfMemoryError(
                f"ring_attention: {size} bytes for the shards that travel: "
                f"{problem or 'another rank has not got them'}"
            )
        self._connect()
        capsule = self.module.as_capsule(self.ring.memory, size, self.index)
        self.bytes, self.size = torch.from_dlpack(capsule), size  # type: ignore[attr-defined]

    def _give_back(self) -> None:
        """Free the memory, when no rank writes to it any more."""
        raise NotImplementedError

    def _allocate(self, size: int) -> None:
        raise NotImplementedError

    def _connect(self) -> None:
        raise NotImplementedError

    # ---- hops ----

    def post(self, hop: Hop) -> Any:
        """As Transport; raises RingError after a failure."""
        sends, recvs, places = [], [], hop.places
        for i, (peer, x) in enumerate(hop.sends):
            sends.append((peer, x.data_ptr(), x.nbytes, places[i]))
        for peer, x in hop.recvs:
            recvs.append((peer, x.data_ptr(), x.nbytes, 0))
        pieces = [(x.data_ptr(), x.nbytes) for x in hop.pieces] if hop.pieces else []
        try:
            return self._post(
                self.stream, self.call_number, CODES[hop.phase], hop.step, hop.part, sends, recvs,
                pieces, self.timeout,
            )  # fmt: skip
        except RuntimeError as error:
            raise self._found(error) from error

    def wait(self, ticket: Any) -> None:
        """As Transport: the current stream waits, not the host."""
        if isinstance(ticket, Ticket):  # of an agreement
            return
        try:
            self.ring.wait(ticket, self.stream)
        except RuntimeError as error:
            raise self._found(error) from error

    def done(self, ticket: Any) -> bool:
        """As Transport."""
        return bool(self.ring.done(ticket))

    def settle(self) -> None:
        """As Transport: the current stream waits, not the host."""
        if self.stream == -1:  # no call of this group has sent anything
            return
        try:
            self.ring.settle(self.stream)
        except RuntimeError as error:
            raise self._found(error) from error

    def use_stream(self, stream: int) -> int:
        """As Transport."""
        before, self.stream = self.stream, stream
        return before

    def synchronize(self) -> None:
        """Wait on the host until every posted hop is done.

        Raises:
            RingError: One of them failed.
        """
        try:
            self.ring.synchronize()
        except RuntimeError as error:
            raise self._found(error) from error

    def begin(self, note: Note, timeout: float, agree: bool) -> None:
        """As GroupTransport; a failed hop of an earlier call is raised here."""
        if self.ring.failed and self.broken is None:
            raise self._found(RuntimeError(self.ring.failure()["error"]))
        super().begin(note, timeout, agree)

    def abort(self, reason: str = "aborted") -> None:
        """As Transport."""
        self.ring.abort(reason)
        super().abort(reason)

    def close(self) -> None:
        """As Transport."""
        self.ring.close()
        self.broken = self.broken or "closed"
        _OPEN.discard(self)

    def entries(self) -> list[dict[str, Any]]:
        """The hops of the log."""
        return [self._named(entry) for entry in self.ring.log()]

    @staticmethod
    def _named(entry: dict[str, Any]) -> dict[str, Any]:
        return {**entry, "phase": PHASES[entry["phase"]]}

    def _found(self, error: Exception) -> RingError:
        """What the watchdog found, as text."""
        hop = self._named(self.ring.failure())
        me, reason = f"rank {self.rank} of {self.world_size}", hop["error"] or str(error)
        peers, step, phase = tuple(sorted({*hop["to"], *hop["from"]})), hop["step"], hop["phase"]
        where = f"{phase!r}, step {step}"
        if hop["number"]:
            waited = time.time() - (hop["ready"] or hop["posted"])
            text = (
                f"{me} waited {waited:.1f} s (timeout {self.timeout:g} s) for ranks {list(peers)}, "
                f"in {where} of call {hop['call']}; the hop is {hop['bytes_sent']} bytes to "
                f"{hop['to']}, {hop['bytes_received']} bytes from {hop['from']}: {reason}. A rank "
                "is late, gone, or was called with other arguments"
            )
        else:  # with no hop under way
            step, phase, where = -1, "agreement", "no hop"
            text = f"{me} gave up in call {self.call_number}: {reason}"
        text += ". Results since then are void; make another group by torch.distributed.new_group"
        if self.broken is None:
            self.broken = f"{where} of call {hop['call'] or self.call_number}: {reason}"
            text += "\n" + "\n".join(self._others(where))
        return RingError(
            f"ring_attention: {text}", rank=self.rank, step=step, phase=phase, peers=peers,
            bytes=hop["bytes_sent"] + hop["bytes_received"],
        )  # fmt: skip


class CopyTransport(DeviceTransport):
    """Between processes of one host, by the copy engine."""

    kind = "p2p"
    gathers: ClassVar[bool] = True

    def __init__(self, group: Any, device: torch.device, timeout: float = 0.0) -> None:
        super().__init__(group, device, timeout)
        problem = ""
        try:
            torch.cuda.synchronize(self.device)  # makes the context, too
            failed.let_go(_with_rings())
            self.ring = self.module.CopyRing(self.rank, self.world_size)
            said = [socket.gethostname().encode(), _boot_id(), self.ring.words_handle()]
        except RuntimeError as error:
            problem, said = str(error), [b"", b"", b""]
        notes = [n.split(b"|", 2) for n in self._exchange("connect", b"|".join(said))]
        if not problem and any(n[:2] != notes[0][:2] for n in notes):
            problem = "the ranks are on different hosts"
        if not problem:
            try:
                self.ring.connect_words([n[2] for n in notes])
            except RuntimeError as error:
                problem = f"a GPU cannot reach the memory of another: {error}"
        if not self._all_succeed("connect", not problem):
            self.close_quietly()
            raise NotImplementedError(
                f'transport="p2p": {problem or "another rank cannot"}; nearest is transport="nccl"'
            )
        failed.free(_with_rings())
        self.lanes = [torch.cuda.Stream(device, priority=p) for p in LANE_PRIORITIES]
        self._choose_words()

    def _choose_words(self) -> None:
        """Let streams write the words of peers, where that works between all ranks."""
        works = True
        try:
            self.ring.try_direct()
        except RuntimeError:
            works = False
        works = self._all_succeed("write words", works) and self.ring.check_direct()
        if self._all_succeed("write words", works):
            self.ring.use_direct()

    def close_quietly(self) -> None:
        """End a transport that was never usable."""
        if hasattr(self, "ring"):
            self.ring.close()
        _OPEN.discard(self)

    def _give_back(self) -> None:
        self.ring.disconnect()
        self._exchange("give memory back", b"")  # now nobody has it mapped
        self.ring.free_memory()

    def _allocate(self, size: int) -> None:
        self.handle = self.ring.allocate(size)

    def _connect(self) -> None:
        self.ring.connect(self._exchange("connect", self.handle))


class NcclTransport(DeviceTransport):
    """By NCCL, from the library that torch has loaded, with communicators of its own."""

    kind = "nccl"

    def __init__(self, group: Any, device: torch.device, timeout: float = 0.0) -> None:
        super().__init__(group, device, timeout)
        problem, ids = "", b""
        try:
            self.module.open_nccl("")
            if self.rank == 0:
                ids = b"".join(self.module.NcclRing.make_ids())
        except RuntimeError as error:
            problem = str(error)
        first = self._exchange("connect", ids)[0]
        if not self._all_succeed("connect", not problem):
            _OPEN.discard(self)
            raise NotImplementedError(
                f'transport="nccl": {problem or "another rank cannot"}; nearest is transport="pg"'
            )
        torch.cuda.synchronize(self.device)
        failed.let_go(_with_rings())
        self._exchange("let go of failed rings", b"")
        failed.free(_with_rings())
        half, most = len(first) // 2, min(32, CHANNELS_WANTED * self.world_size)
        halves = [first[:half], first[half:]]
        self.ring = self.module.NcclRing(self.rank, self.world_size, halves, most)
        self.registered = False

    def _give_back(self) -> None:
        self._exchange("give memory back", b"")
        self.ring.free_memory()

    def _allocate(self, size: int) -> None:
        self.registered = self.ring.allocate(size)

    def _connect(self) -> None:
        if not self._all_succeed("register", self.registered):
            self.ring.deregister()  # on every rank or on none
            self.registered = False
        self.ring.warm_up()


KINDS: dict[str, type[DeviceTransport]] = {"p2p": CopyTransport, "nccl": NcclTransport}
_OPEN: weakref.WeakSet[DeviceTransport] = weakref.WeakSet()


def _with_rings() -> list[DeviceTransport]:
    return [transport for transport in _OPEN if hasattr(transport, "ring")]


def _boot_id() -> bytes:
    """What two processes of one running system have in common."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    return b""


@atexit.register
def _close_all() -> None:
    """End the transports; after an exception at once, else when peers have had their last hops."""
    died = getattr(sys, "last_value", None) is not None
    for transport in _with_rings():
        transport.ring.close(1.0 if died else transport.timeout)
