"""Streams beside the caller's, for kernels of one call that need not wait for one another.

A launch ends with fewer tiles than multiprocessors; what follows it in the same stream waits for
the last of them. Kernels of other streams take the multiprocessors that are free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from .schedule import Call
from .transport import Transport

THE_CALLERS = contextlib.nullcontext()


class _On(AbstractContextManager[None]):
    """As torch.cuda.stream, of a stream of the current device, and for hops too."""

    def __init__(self, transport: Transport, stream: torch.cuda.Stream) -> None:
        self.transport, self.stream = transport, stream

    def __enter__(self) -> None:
        self.before = torch._C._cuda_getCurrentStream(self.stream.device_index)
        self.posts_on = self.transport.use_stream(self.stream.cuda_stream)
        torch.cuda.set_stream(self.stream)

    def __exit__(self, *_: object) -> None:
        stream, index, kind = self.before
        torch._C._cuda_setStream(stream_id=stream, device_index=index, device_type=kind)
        self.transport.use_stream(self.posts_on)


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
        if self.streams:
            now = torch.cuda.current_stream(self.streams[0].device).record_event()
            for stream in self.streams:
                stream.wait_event(now)
        return self

    def __exit__(self, *_: object) -> None:
        self.join()

    def on(self, lane: int) -> AbstractContextManager[None]:
        """Kernels and hops of this block belong to a lane, counted round."""
        if not self.streams:
            return THE_CALLERS
        return _On(self.transport, self.streams[lane % len(self.streams)])

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
