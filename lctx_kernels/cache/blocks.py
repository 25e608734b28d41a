"""Blocks of keys and values on the device of the computation or in the CPU's memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from .buffer import Buffer
from .pinned import PinnedRoom

LEFT: list[PinnedRoom] = []  # rooms whose owners went while a graph was captured


class Fetch:
    """Blocks of single heads on their way to the device of the computation.

    index: The numbers that were asked for, as numbers of the blocks that come.
    """

    def __init__(
        self, k: Tensor, v: Tensor, index: Tensor, stream: torch.cuda.Stream | None = None
    ) -> None:
        self.k, self.v, self.index, self.stream = k, v, index, stream

    def wait(self) -> tuple[Tensor, Tensor]:
        """The blocks, (B, n, L, D) each, as soon as they have arrived."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.k.device)
            current.wait_stream(self.stream)
            self.k.record_stream(current)
            self.v.record_stream(current)
        return self.k, self.v


class BlockStore:
    """Whole blocks in the order they came, head by head, their landmarks beside them.

    Keys are rotated to their places inside of their block.

    Args:
        block_size: Tokens of a block, the last of them its landmark.
        offload: Keep the blocks in the CPU's memory (pinned, if the computation is on a GPU);
            landmarks stay where the computation is.
        max_blocks: Blocks to keep, the oldest are forgotten; None is no limit.
    """

    def __init__(self, block_size: int, offload: bool, max_blocks: int | None) -> None:
        self.block_size, self.offload, self.max_blocks = block_size, offload, max_blocks
        self.k, self.v = _Blocks(offload), _Blocks(offload)  # (B, count, Hkv, L, D)
        self.keys = Buffer()  # of the landmarks, (B, count, Hkv, D)
        self.dropped = 0  # blocks at the front that are forgotten
        self.stream: torch.cuda.Stream | None = None

    @property
    def count(self) -> int:
        """Blocks that can be read."""
        return self.keys.length - self.dropped

    @property
    def landmarks(self) -> Tensor:
        """(B, count, Hkv, D) keys of the landmarks, at place block_size - 1."""
        return self.keys.since(self.dropped)

    @property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """(B, count, Hkv, L, D) keys and values, where they are kept."""
        return self.k.since(self.dropped), self.v.since(self.dropped)

    def reserve(self, count: int) -> None:
        """Make room for `count` more blocks, and some, at once when the first of them comes."""
        count += count // 8
        if self.max_blocks is not None:
            count = min(count, 2 * self.max_blocks)
        for buffer in (self.k, self.v, self.keys):
            buffer.reserve(count)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add whole blocks, (B, n, Hkv, L, D)."""
        self.keys.append(k[:, :, :, -1])
        self.k.append(k)
        self.v.append(v)
        if self.max_blocks is not None and self.count > self.max_blocks:
            self.dropped = self.keys.length - self.max_blocks
            if self.dropped >= self.max_blocks:  # half of the room: copying costs O(1) per block
                for buffer in (self.k, self.v, self.keys):
                    buffer.drop(self.dropped)
                self.dropped = 0

    def fetch(self, pairs: Tensor) -> Fetch:
        """Start to bring blocks of single heads to where they are used.

        pairs: (B, ..., k) int64, block * Hkv + head.
        """
        k, v = (x.flatten(1, 2) for x in self.blocks)
        if not self.offload:
            return Fetch(k, v, pairs)
        wanted, index = pairs.unique(return_inverse=True)
        if pairs.device.type != "cuda":
            return Fetch(k.index_select(1, wanted), v.index_select(1, wanted), index)
        if self.stream is None:
            self.stream = torch.cuda.Stream(pairs.device)
        self.stream.wait_stream(torch.cuda.current_stream(pairs.device))  # blocks may be on the way
        wanted.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            k, v = (x.gathered(self.dropped, wanted) for x in (self.k, self.v))
        return Fetch(k, v, index, self.stream)

    def select(self, rows: Tensor) -> BlockStore:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        chosen = BlockStore(self.block_size, self.offload, self.max_blocks)
        chosen.k, chosen.v = self.k.select(rows), self.v.select(rows)
        chosen.keys, chosen.dropped = self.keys.select(rows), self.dropped
        return chosen


class _Blocks(Buffer):
    """A buffer that may lie in the CPU's memory, whatever device its contents come from.

    Blocks from a GPU go to pinned memory, in the order of the GPU's stream: kernels read them
    there, the CPU waits for the GPU before it touches them.
    """

    def __init__(self, offload: bool) -> None:
        super().__init__()
        self.offload = offload
        self.gpu: torch.device | None = None  # that writes and reads pinned memory
        self.pinned: PinnedRoom | None = None

    def append(self, x: Tensor) -> None:
        if self.offload and x.is_cuda:
            self.gpu = x.device
        super().append(x)

    def select(self, rows: Tensor) -> _Blocks:
        chosen = _Blocks(self.offload)
        chosen.gpu = self.gpu
        if self.room is not None:
            self._wait()
            rows = rows.to(self.room.device)
            chosen.room = chosen._new(self.room, (rows.numel(), *self.room.shape[1:]))
            chosen.room.copy_(self.room.index_select(0, rows))
        chosen.length, chosen.planned = self.length, self.planned
        return chosen

    def gathered(self, start: int, wanted: Tensor) -> Tensor:
        """(B, n, L, D) blocks of single heads from pinned memory, by a kernel of the GPU."""
        if self.pinned is None:
            raise ValueError("_Blocks: nothing was appended yet")
        blocks = self.pinned.on_gpu()[:, start : self.length].flatten(1, 2)
        if blocks.shape[-1] * blocks.element_size() % 8:
            return blocks.index_select(1, wanted)
        return blocks.view(torch.int64).index_select(1, wanted).view(blocks.dtype)  # wide reads

    def _new(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        if not self.offload:
            return super()._new(like, shape)
        if self.gpu is None:
            return torch.empty(shape, dtype=like.dtype)
        pinned = self.pinned = PinnedRoom(shape, like.dtype, self.gpu)
        return pinned.value

    def _move(self, like: Tensor, start: int, size: int) -> None:
        self._wait()
        before = self.pinned
        super()._move(like, start, size)
        if before is not None:
            before.free()

    def _write(self, x: Tensor, end: int) -> None:
        if self.gpu is None or self.room is None:
            super()._write(x.cpu() if self.offload else x, end)
            return
        for row, part in zip(self.room, x, strict=True):
            row[self.length : end].copy_(part.contiguous(), non_blocking=True)

    def _wait(self) -> None:
        """Until no kernel and no copy uses the memory any more."""
        if self.gpu is not None and self.room is not None:
            torch.cuda.synchronize(self.gpu)

    def __del__(self) -> None:
        if self.pinned is None or sys.is_finalizing():
            return
        if torch.cuda.is_current_stream_capturing():
            LEFT.append(self.pinned)  # waiting is not possible: the memory stays as it is
            return
        self._wait()  # the memory goes back, and may be handed out again
        self.pinned.free()
