"""Blocks of keys and values on the device of the computation or in the CPU's memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .buffer import Buffer


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

    Args:
        block_size: Tokens of a block, the last of them its landmark.
        offload: Keep the blocks in the CPU's memory (pinned on the way, copied back on a stream of
            its own, if the computation is on a GPU); landmarks stay where the computation is.
        max_blocks: Blocks to keep, the oldest are forgotten; None is no limit.
    """

    def __init__(self, block_size: int, offload: bool, max_blocks: int | None) -> None:
        self.block_size, self.offload, self.max_blocks = block_size, offload, max_blocks
        self.k, self.v = _Blocks(offload), _Blocks(offload)  # (B, count, Hkv, L, D)
        self.keys, self.far_keys = Buffer(), Buffer()  # of the landmarks, (B, count, Hkv, D)
        self.dropped = 0  # blocks at the front that are forgotten
        self.stream: torch.cuda.Stream | None = None

    @property
    def count(self) -> int:
        """Blocks that can be read."""
        return self.keys.length - self.dropped

    @property
    def landmarks(self) -> Tensor:
        """(B, count, Hkv, D) keys of the landmarks, not rotated."""
        return self.keys.value[:, self.dropped :]

    @property
    def far_landmarks(self) -> Tensor:
        """(B, count, Hkv, D) keys of the landmarks, rotated to the place that far blocks share."""
        return self.far_keys.value[:, self.dropped :]

    def append(self, k: Tensor, v: Tensor, far_keys: Tensor) -> None:
        """Add whole blocks, (B, n * block_size, Hkv, D) tokens, and their rotated landmarks."""
        k, v = (x.unflatten(1, (-1, self.block_size)) for x in (k, v))
        self.keys.append(k[:, :, -1])
        self.far_keys.append(far_keys)
        self.k.append(k.transpose(2, 3))
        self.v.append(v.transpose(2, 3))
        if self.max_blocks is not None and self.count > self.max_blocks:
            self.dropped = self.keys.length - self.max_blocks
            if self.dropped >= self.max_blocks:  # half of the room: copying costs O(1) per block
                for buffer in (self.k, self.v, self.keys, self.far_keys):
                    drop(buffer, self.dropped)
                self.dropped = 0

    def fetch(self, pairs: Tensor) -> Fetch:
        """Start to bring blocks of single heads to where they are used.

        pairs: (B, ..., k) int64, block * Hkv + head.
        """
        k, v = (x.value[:, self.dropped :].flatten(1, 2) for x in (self.k, self.v))
        if not self.offload:
            return Fetch(k, v, pairs)
        wanted, index = pairs.cpu().unique(return_inverse=True)
        device = pairs.device
        index = index.to(device, non_blocking=True)
        if device.type != "cuda":
            return Fetch(k.index_select(1, wanted), v.index_select(1, wanted), index)
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        gathered = []
        for x in (k, v):
            room = x.new_empty(x.shape[0], wanted.numel(), *x.shape[2:], pin_memory=True)
            gathered.append(torch.index_select(x, 1, wanted, out=room))
        with torch.cuda.stream(self.stream):
            k, v = (x.to(device, non_blocking=True) for x in gathered)
        return Fetch(k, v, index, self.stream)

    def select(self, rows: Tensor) -> BlockStore:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        chosen = BlockStore(self.block_size, self.offload, self.max_blocks)
        chosen.k, chosen.v = self.k.select(rows), self.v.select(rows)
        chosen.keys, chosen.far_keys = self.keys.select(rows), self.far_keys.select(rows)
        chosen.dropped = self.dropped
        return chosen


class _Blocks(Buffer):
    """A buffer that may lie in the CPU's memory, whatever device its contents come from."""

    def __init__(self, offload: bool) -> None:
        super().__init__()
        self.offload = offload

    def append(self, x: Tensor) -> None:
        super().append(x.cpu() if self.offload else x)

    def select(self, rows: Tensor) -> _Blocks:
        chosen = _Blocks(self.offload)
        if self.room is not None:
            chosen.room = self.room.index_select(0, rows.to(self.room.device))
        chosen.length = self.length
        return chosen


def drop(buffer: Buffer, count: int) -> None:
    """Forget the first `count` entries."""
    kept = buffer.value[:, count:].clone()
    buffer.room, buffer.length = kept, kept.shape[1]
