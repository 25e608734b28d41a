"""How shards travel: the interface that the ring is written against, and all ranks in one process.

A transport moves flat buffers between the ranks of one group. The ring does not know which one it
has, so all of them give the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Message = tuple[int, int, str, int, int]
"""Source, target, phase, step and part of a simulated message."""


class Note(NamedTuple):
    """What a rank says of a call that all ranks must make alike: by name, and as text."""

    fields: dict[str, Any]
    text: str

    @staticmethod
    def of(fields: dict[str, Any]) -> Note:
        """The note of these facts, which JSON has words for."""
        return Note(fields, json.dumps(fields, sort_keys=True))


class Hop(NamedTuple):
    """One exchange of a rank. All ranks post the same hops in the same order.

    Attributes:
        phase: "forward kv", "backward kv" or "backward dkv".
        step: Step of the ring.
        part: Which group of key/value heads.
        sends, recvs: (peer, contiguous buffer); peers are ranks of the group.
        places: Of every send, where in the peer's memory it is received, in bytes.
        pieces: Contiguous tensors that the only send is made of; its buffer is then not filled.
            For transports that gather.
    """

    phase: str
    step: int
    part: int
    sends: tuple[tuple[int, Tensor], ...]
    recvs: tuple[tuple[int, Tensor], ...]
    places: tuple[int, ...] = ()
    pieces: tuple[Tensor, ...] = ()

    @property
    def bytes_sent(self) -> int:
        """Bytes that leave this rank."""
        return sum(x.numel() * x.element_size() for _, x in self.sends)

    @property
    def bytes_received(self) -> int:
        """Bytes that arrive here."""
        return sum(x.numel() * x.element_size() for _, x in self.recvs)


class Transport(Protocol):
    """What a posted hop receives is there when `wait` returns or `done` is true.

    What it sends has left then if it is a sum; keys may still be leaving, until the ticket of a
    later hop of keys was waited for, or `settle` returns.

    Attributes:
        gathers: Whether a send may consist of pieces anywhere in the device's memory.
        lanes: Streams for kernels beside the caller's; none where hops need multiprocessors.
    """

    gathers: ClassVar[bool]

    @property
    def lanes(self) -> Sequence[torch.cuda.Stream]:
        """As above."""

    def memory(self, size: int, device: torch.device) -> Tensor:
        """(size,) uint8, which all buffers of a call's hops are parts of; every rank asks."""

    def post(self, hop: Hop) -> Any:
        """Start the exchange; returns its ticket."""

    def wait(self, ticket: Any) -> None:
        """Return when what comes after may use the buffers; raises RingError past the deadline."""

    def done(self, ticket: Any) -> bool:
        """Whether `wait` would return at once."""

    def settle(self) -> None:
        """Return when what comes after may write to all that was sent."""

    def use_stream(self, stream: int) -> int:
        """Post and wait on this CUDA stream from now on; returns the one before, 0 without any."""

    def abort(self, reason: str = "aborted") -> None:
        """Give up everything posted; the transport cannot be used any more. Keeps the first."""

    def close(self) -> None:
        """Release what the transport holds, with nothing posted."""


Steps = Generator[Any, None, Result]
"""A rank's work: yields the tickets that it has to wait for."""


class RingError(RuntimeError):
    """A hop that did not happen: a peer that is late, gone, or called with other arguments.

    Attributes:
        rank: This rank.
        step: Step of the ring, -1 before the first.
        phase: Phase of the hop, as in `Hop`, or "agreement".
        peers: Ranks that this one exchanged with.
        bytes: Bytes that it was to send and to receive.
    """

    def __init__(
        self, text: str, *, rank: int, step: int, phase: str, peers: tuple[int, ...], bytes: int
    ) -> None:
        super().__init__(text)
        self.rank, self.step, self.phase = rank, step, phase
        self.peers, self.bytes = peers, bytes


def run_alone(steps: Steps[Result], transport: Transport) -> Result:
    """Run one rank's work to its end.

    The peers' hops wait for all of it: where it stops half way, memory being short or the user
    having had enough, what comes next from this rank would be taken for what is missing.
    """
    try:
        while True:
            transport.wait(next(steps))
    except StopIteration as end:
        transport.settle()
        result: Result = end.value
        return result
    except BaseException as error:
        transport.abort(f"{type(error).__name__} in the middle of it: {error}".splitlines()[0])
        raise
    finally:
        steps.close()  # and leave the streams that it was on


class Simulator:
    """All ranks of a group in this process, one step at a time each.

    It is as hostile as a transport may be: a receive buffer holds NaN until its hop is done, and a
    send buffer is read as late as possible, when either side waits.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.posted: dict[Message, Tensor] = {}
        self.expected: dict[Message, Tensor] = {}
        self.places: dict[Message, int] = {}
        self.memories: dict[int, Tensor] = {}
        self.bytes_sent = [0] * world_size

    def rank(self, rank: int) -> SimulatedRank:
        """The transport of one rank."""
        return SimulatedRank(self, rank)

    def run(self, ranks: list[Steps[Result]]) -> list[Result]:
        """Run the work of all ranks in turn; their results.

        Raises:
            RuntimeError: All of them wait: a hop that no peer posts.
        """
        results: dict[int, Result] = {}
        waits: dict[int, tuple[Any, ...]] = dict.fromkeys(range(len(ranks)), ())
        while len(results) < len(ranks):
            moved = False
            for rank, steps in enumerate(ranks):
                if rank in results or not all(map(self.deliver, waits[rank])):
                    continue
                moved = True
                try:
                    waits[rank] = next(steps)
                except StopIteration as end:
                    results[rank] = end.value
            if not moved:
                pending = {r: [k[2:] for k in w] for r, w in waits.items() if r not in results}
                raise RuntimeError(f"the simulated ring stands still; ranks wait for {pending}")
        if self.posted or self.expected:
            raise RuntimeError("the simulated ring ended with hops that nobody waited for")
        return [results[rank] for rank in range(len(ranks))]

    def deliver(self, key: Message) -> bool:
        """Whether the buffer of `key` has been moved, now or before."""
        if key in self.posted and key in self.expected:
            source, target = self.posted.pop(key), self.expected.pop(key)
            if source.shape != target.shape or source.dtype != target.dtype:
                raise RuntimeError(f"{key}: {source.shape} was sent, {target.shape} expected")
            place, base = self.places.pop(key), self.memories.get(key[1], target).data_ptr()
            if target.numel() and base + place != target.data_ptr():
                raise RuntimeError(f"{key}: sent to another place than it is expected at")
            target.copy_(source)
        return key not in self.posted and key not in self.expected


@dataclass(frozen=True)
class SimulatedRank:
    """One rank of a `Simulator`; a ticket is the tuple of its messages."""

    simulator: Simulator
    own: int
    gathers: ClassVar[bool] = False
    lanes: ClassVar[tuple[torch.cuda.Stream, ...]] = ()

    def memory(self, size: int, device: torch.device) -> Tensor:
        """As Transport."""
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.simulator.memories[self.own] = memory
        return memory

    def post(self, hop: Hop) -> tuple[Any, ...]:
        """As Transport."""
        sim = self.simulator
        for (peer, buffer), place in zip(hop.sends, hop.places, strict=True):
            sim.posted[self.key(self.own, peer, hop)] = buffer
            sim.places[self.key(self.own, peer, hop)] = place
        for peer, buffer in hop.recvs:
            sim.expected[self.key(peer, self.own, hop)] = buffer.fill_(torch.nan)
        sim.bytes_sent[self.own] += hop.bytes_sent
        sends = tuple(self.key(self.own, peer, hop) for peer, _ in hop.sends)
        return sends + tuple(self.key(peer, self.own, hop) for peer, _ in hop.recvs)

    @staticmethod
    def key(source: int, target: int, hop: Hop) -> Message:
        """What identifies a message."""
        return source, target, hop.phase, hop.step, hop.part

    def done(self, ticket: tuple[Any, ...]) -> bool:
        """As Transport."""
        return all(map(self.simulator.deliver, ticket))

    def wait(self, ticket: tuple[Any, ...]) -> None:
        """As Transport."""
        if not self.done(ticket):
            raise RuntimeError("a simulated rank cannot wait: Simulator.run runs all of them")

    def settle(self) -> None:
        """As Transport: both sides of a message have waited for it."""

    def use_stream(self, stream: int) -> int:
        """As Transport."""
        return 0

    def abort(self, reason: str = "aborted") -> None:
        """As Transport."""
        self.simulator.posted.clear()
        self.simulator.expected.clear()

    def close(self) -> None:
        """As Transport."""
        self.abort()
