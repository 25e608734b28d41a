"""Shards by `torch.distributed`: any process group, with a deadline for every hop.

Nothing is sent before all ranks have agreed on what they are about to do, and a peer that is late,
gone, or does something else is an exception that says where and whom this rank waited for.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .transport import Hop, Note, RingError

LOG_LENGTH = 4096  # hops that a group's log keeps
NOTE_BYTES = 2048  # of what a rank says of its call before anything is sent
ANNOUNCE_SECONDS = 10.0  # that a rank waits to tell the others of its error
STATUS_SECONDS = 2.0  # that a rank that gives up waits for what the others have to say


@dataclass
class Ticket:
    """A posted hop: its works, and for which peer and direction each of them is."""

    hop: Hop
    works: list[tuple[str, int, Any]]
    deadline: float
    entry: dict[str, Any]


class GroupTransport:
    """The hops of one rank of a process group. One for each group, made at its first call."""

    gathers: ClassVar[bool] = False
    lanes: Sequence[torch.cuda.Stream] = ()

    def __init__(self, group: Any, device: torch.device) -> None:
        import torch.distributed as dist

        self.group, self.device = group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.timeout = self.default_timeout = _group_timeout(group, device)
        self.call_number, self.note = 0, ""
        self.log: collections.deque[dict[str, Any]] = collections.deque(maxlen=LOG_LENGTH)
        self.broken: str | None = None
        self.agreed: set[str] = set()
        self.kept: list[Any] = []  # buffers of hops that never ended: a late peer may write to them

    # ---- calls ----

    def begin(self, note: Note, timeout: float, agree: bool) -> None:
        """Start a call: the deadline of its hops, and the agreement of all ranks on `note`.

        A forward on CPU tensors agrees every time. On a GPU, where that would wait for the device,
        a group agrees once on every kind of call.

        Raises:
            NotImplementedError: A timeout that cannot be had, or a CUDA graph that is captured.
            ValueError: Another rank has refused its arguments, or has other ones.
            RingError: Another rank does not come, or the group has been aborted.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise NotImplementedError(
                f"{note.fields.get('op', 'ring_attention')}: a CUDA graph is being captured; hops "
                "are counted and watched on the host, which a replay would not do; expected calls "
                'outside of graphs (torch.compile: mode="default", or no cudagraphs)'
            )
        self.call_number += 1
        if timeout and self.device.type != "cpu" and type(self) is GroupTransport:
            raise NotImplementedError(
                'ring_attention: timeout is given with CUDA tensors and transport="pg", whose hops '
                "the process group itself watches; nearest is timeout=None and the timeout of the "
                "group (init_process_group, new_group)"
            )
        self.timeout = timeout or self.default_timeout
        if self.broken is not None:
            raise RingError(
                f"rank {self.rank}: this group was given up: {self.broken}; make another by "
                "torch.distributed.new_group",
                rank=self.rank, step=-1, phase="agreement", peers=(), bytes=0,
            )  # fmt: skip
        self.note = note.text
        if agree and (self.device.type == "cpu" or self.note not in self.agreed):
            self._agree(note.fields)
            self.agreed.add(self.note)

    def announce(self, error: str) -> None:
        """Tell the other ranks that this one refuses its arguments; they raise it too.

        Ranks that do not come soon hear nothing: the caller's own error must not wait for them.
        """
        if self.broken is None and (self.device.type == "cpu" or not self.agreed):
            self.call_number += 1
            self.timeout = min(self.default_timeout, ANNOUNCE_SECONDS)
            with contextlib.suppress(RingError):
                self._exchange_notes({"error": error})

    def _exchange_notes(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        import torch.distributed as dist

        text = json.dumps(note).encode()
        while len(text) > NOTE_BYTES:  # only errors are so long
            note = {"error": note["error"][: len(note["error"]) * 3 // 4]}
            text = json.dumps(note).encode()
        mine = torch.tensor(list(text.ljust(NOTE_BYTES)), dtype=torch.uint8, device=self.device)
        notes = [torch.empty_like(mine) for _ in range(self.world_size)]
        others = tuple(r for r in range(self.world_size) if r != self.rank)
        hop = Hop("agreement", -1, 0, tuple((r, mine) for r in others), ())
        ticket = Ticket(hop, [], time.monotonic() + self.timeout, self._entry(hop))
        try:
            work = dist.all_gather(notes, mine, group=self.group, async_op=True)
            ticket.works.append(("to agree with", -1, work))
        except RuntimeError as error:
            raise self._failure(ticket, "to agree with", -1, error) from error
        self.wait(ticket)
        return [json.loads(bytes(n.tolist())) for n in notes]

    def _agree(self, note: dict[str, Any]) -> None:
        """Compare notes. Calls are counted alike from here on: not all may have gone back."""
        notes = self._exchange_notes({**note, "call": self.call_number})
        self.call_number = max(n.pop("call", 0) for n in notes)
        who = note.get("op", "ring_attention")
        refused = [f"rank {r}: {n['error']}" for r, n in enumerate(notes) if "error" in n]
        if refused:
            raise ValueError(
                f"{who}: nothing was sent, because other ranks refuse their arguments:\n"
                + "\n".join(refused)
            )
        if any(other != notes[0] for other in notes):
            fields = [f for f in note if any(n.get(f) != notes[0].get(f) for n in notes)]
            lines = (
                f"rank {r}: " + ", ".join(f"{f} = {n.get(f)}" for f in fields)
                for r, n in enumerate(notes)
            )
            raise ValueError(
                f"{who}: nothing was sent, because the ranks were called with different "
                "arguments; expected equal ones:\n" + "\n".join(lines)
            )

    # ---- hops ----

    @property
    def memory_bytes(self) -> int:
        """Bytes that are held between calls, besides torch's own."""
        return 0

    def memory(self, size: int, device: torch.device) -> Tensor:
        """As Transport."""
        return torch.empty(size, dtype=torch.uint8, device=device)

    def _entry(self, hop: Hop) -> dict[str, Any]:
        entry = {
            "call": self.call_number, "phase": hop.phase, "step": hop.step, "part": hop.part,
            "to": [peer for peer, _ in hop.sends], "from": [peer for peer, _ in hop.recvs],
            "bytes_sent": hop.bytes_sent, "bytes_received": hop.bytes_received,
            "posted": time.time(), "done": None, "error": None,
        }  # fmt: skip
        self.log.append(entry)
        return entry

    def post(self, hop: Hop) -> Ticket:
        """As Transport; raises RingError at once where a peer is known to be gone."""
        import torch.distributed as dist

        ticket = Ticket(hop, [], time.monotonic() + self.timeout, self._entry(hop))
        messages: list[tuple[Any, str, int, Tensor]]
        messages = [(dist.isend, "to send to", *m) for m in hop.sends]
        messages += [(dist.irecv, "to receive from", *m) for m in hop.recvs]
        messages = [m for m in messages if m[3].numel() > 0]
        if not messages:
            return ticket
        ops = [
            dist.P2POp(
                op, _raw(buffer), group=self.group, tag=self._tag(hop, buffer), group_peer=peer
            )
            for op, _, peer, buffer in messages
        ]
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            raise self._failure(ticket, messages[0][1], messages[0][2], error) from error
        if len(works) == len(messages):
            names = [(what, peer) for _, what, peer, _ in messages]
        else:  # one work for all
            names = [("to exchange with", messages[0][2])] * len(works)
        ticket.works = [(*name, work) for name, work in zip(names, works, strict=True)]
        return ticket

    def _tag(self, hop: Hop, buffer: Tensor) -> int:
        """Never that of a peer in another call: gloo ends a process that receives too much."""
        label = f"{self.call_number} {self.note} {hop.phase} {hop.step} {hop.part} {buffer.nbytes}"
        return zlib.crc32(label.encode()) & 0x7FFFFFFF

    def wait(self, ticket: Ticket) -> None:
        """As Transport. On a GPU the stream waits, and the group's own timeout rules."""
        for what, peer, work in ticket.works:
            if self.device.type != "cpu":
                work.wait()
                continue
            left = max(ticket.deadline - time.monotonic(), 0.001)
            try:
                if not work.wait(datetime.timedelta(seconds=left)):
                    raise RuntimeError("the exchange was aborted")
            except RuntimeError as error:
                raise self._failure(ticket, what, peer, error) from error
        if self.device.type == "cpu":
            ticket.entry["done"] = time.time()

    def done(self, ticket: Ticket) -> bool:
        """As Transport."""
        return all(work.is_completed() for _, _, work in ticket.works)

    def settle(self) -> None:
        """As Transport: `wait` waits for what is sent, too."""

    def use_stream(self, stream: int) -> int:
        """As Transport; the group uses the current stream."""
        return 0

    def abort(self, reason: str = "aborted") -> None:
        """As Transport. The others hear of it when their own hops with this rank fail."""
        if self.broken is None:
            self.broken = reason
            said = f"gave up in call {self.call_number}: {reason}"
            _in_time(lambda: _store(self.group).set(f"lctx_ring/{self.rank}", said))

    def close(self) -> None:
        """As Transport."""
        self.kept.clear()

    def synchronize(self) -> None:
        """Nothing to do: `wait` waits for hops on CPU tensors, NCCL's watchdog for the others."""

    def entries(self) -> list[dict[str, Any]]:
        """The hops of the log."""
        return list(self.log)

    # ---- what went wrong ----

    def _failure(self, ticket: Ticket, what: str, peer: int, error: Exception) -> RingError:
        hop = ticket.hop
        waited = self.timeout - (ticket.deadline - time.monotonic())
        where = f"{hop.phase!r}, step {hop.step}" if hop.step >= 0 else hop.phase
        whom = f"rank {peer}" if peer >= 0 else "the other ranks"
        peers = tuple(sorted({p for p, _ in (*hop.sends, *hop.recvs)}))
        moved = f"{hop.bytes_sent} bytes to {[p for p, _ in hop.sends]}, {hop.bytes_received} bytes"
        reason = str(error).splitlines()[0]
        text = (
            f"ring_attention: rank {self.rank} of {self.world_size} waited {waited:.1f} s (timeout "
            f"{self.timeout:g} s) {what} {whom}, in {where} of call {self.call_number}; the hop is "
            f"{moved} from {[p for p, _ in hop.recvs]}. {whom} is late, gone, or was called with "
            f"other arguments: {reason}"
        )
        ticket.entry["error"] = reason
        self.kept.append(ticket)
        self.broken = f"rank {self.rank} waited in vain {what} {whom} in {where}"
        text += "\n" + "\n".join(self._others(where))
        return RingError(
            text, rank=self.rank, step=hop.step, phase=hop.phase, peers=peers,
            bytes=hop.bytes_sent + hop.bytes_received,
        )  # fmt: skip

    def _others(self, where: str) -> list[str]:
        """What each other rank says of itself, by the group's store, if it still can."""
        said: dict[int, str] = {}

        def ask() -> None:
            store = _store(self.group)
            store.set(f"lctx_ring/{self.rank}", f"gave up in {where}, call {self.call_number}")
            end = time.monotonic() + STATUS_SECONDS * 0.9
            while time.monotonic() < end and len(said) < self.world_size - 1:
                for rank in range(self.world_size):
                    key = f"lctx_ring/{rank}"
                    if rank != self.rank and rank not in said and store.check([key]):
                        said[rank] = store.get(key).decode()
                time.sleep(0.1)

        _in_time(ask)
        return [
            f"rank {rank}: {said.get(rank, 'says nothing: still at work, or gone')}"
            for rank in range(self.world_size)
            if rank != self.rank
        ]


def _in_time(ask: Callable[[], None]) -> None:
    """Ask a store that may not answer."""

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the process that keeps the store is gone
            ask()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STATUS_SECONDS)


def _raw(buffer: Tensor) -> Tensor:
    """Bytes on the CPU, where not every group knows every dtype."""
    return buffer.view(torch.uint8) if buffer.device.type == "cpu" else buffer


def _group_timeout(group: Any, device: torch.device) -> float:
    """Seconds; what the group was made with."""
    from torch.distributed import constants

    try:
        options = group._get_backend(device).options
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return float(constants.default_pg_timeout.total_seconds())


def _store(group: Any) -> Any:
    from torch.distributed import distributed_c10d

    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return distributed_c10d._get_process_group_store(group)
