"""Streams beside the caller's, for kernels of one call that need not wait for one another.

A launch ends with fewer tiles than multiprocessors; what follows it in the same stream waits for
the last of them. Kernels of other streams take the multiprocessors that are free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from .schedule import Call
from .transport import Transport


class Lanes:
    """The transport's streams, if wanted, between the begin and the end of a `with` block.

    They wait for what the caller's stream has been given when the block begins; when it ends,
    however that is, the caller's stream waits for them, before it gives back what they use.
    """

    def __init__(self, transport: Transport, wanted: bool = True) -> None:
        self.transport, self.streams = transport, transport.lanes if wanted else ()

    def __len__(self) -> int:
        """How many there are, the caller's stream where there is no other."""
        return max(len(self.streams), 1)

    def __enter__(self) -> Lanes:
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        return self

    def __exit__(self, *_: object) -> None:
        self.join()

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
        finally:
            self.transport.use_stream(caller)

    def join(self) -> None:
        """The caller's stream waits for what lanes have been given."""
        for stream in self.streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

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
