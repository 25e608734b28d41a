"""Streams beside the caller's, for kernels of one call that need not wait for one another.

A launch ends with fewer tiles than multiprocessors; what follows it in the same stream waits for
the last of them. Kernels of other streams take the multiprocessors that are free.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch

from .schedule import Call
from .transport import Transport

PRIORITIES = (-2, -1)  # above the caller's, below those of hops


@functools.lru_cache(maxsize=64)
def _stream(index: int, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index, priority=priority)


class Lanes:
    """Up to two streams; none where hops need multiprocessors, which one stream orders.

    Everything that a lane is given comes after what `fork` has seen of the caller's stream.
    """

    def __init__(self, transport: Transport, device: torch.device, wanted: bool = True) -> None:
        self.transport, self.device = transport, device
        self.streams: list[torch.cuda.Stream] = []
        if wanted and transport.by_copy_engine and device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.streams = [_stream(index, priority) for priority in PRIORITIES]

    def __len__(self) -> int:
        """How many there are, the caller's stream where there is no other."""
        return max(len(self.streams), 1)

    @contextlib.contextmanager
    def on(self, lane: int) -> Iterator[None]:
        """Kernels and hops of this block belong to a lane, counted round."""
        if not self.streams:
            yield
            return
        stream = self.streams[lane % len(self.streams)]
        caller = self.transport.use_stream(stream.cuda_stream)
        try:
            with torch.cuda.stream(stream):
                yield
        except BaseException:
            self.join()  # before what they use is given back
            raise
        finally:
            self.transport.use_stream(caller)

    def fork(self) -> None:
        """Lanes wait for what the caller's stream has been given."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(self.device))

    def join(self) -> None:
        """The caller's stream waits for what lanes have been given."""
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def meet(self) -> None:
        """The first lane waits for what the others have been given."""
        for stream in self.streams[1:]:
            self.streams[0].wait_stream(stream)

    def deal(self, calls: Sequence[Call], spread: bool, lane: int) -> Iterator[tuple[int, Call]]:
        """Calls and their lanes: `lane`, or all in turn, behind all that lanes have, then met."""
        if not spread:
            yield from ((lane, call) for call in calls)
            return
        self.meet()
        for stream in self.streams[1:]:
            stream.wait_stream(self.streams[0])
        yield from enumerate(calls)
        self.meet()
