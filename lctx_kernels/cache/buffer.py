"""A tensor that grows along its second dimension, with copies that are rare as it grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Buffer:
    """(B, length, ...) tokens or blocks; `append` writes in place and doubles the room if needed.

    >>> buffer = Buffer()
    >>> buffer.append(torch.ones(1, 3, 2)), buffer.append(torch.zeros(1, 1, 2))
    (None, None)
    >>> buffer.value.shape
    torch.Size([1, 4, 2])
    """

    def __init__(self) -> None:
        self.room: Tensor | None = None
        self.length = 0
        self.planned = 0  # entries to make room for at once

    @property
    def value(self) -> Tensor:
        """What was appended so far, as a view."""
        return self.since(0)

    def since(self, start: int) -> Tensor:
        """What was appended from entry `start` on, as a view."""
        if self.room is None:
            raise ValueError("Buffer: nothing was appended yet")
        return self.room[:, start : self.length]

    def reserve(self, count: int) -> None:
        """The next `append` that needs room makes it for `count` more entries than there are."""
        self.planned = self.length + count

    def append(self, x: Tensor) -> None:
        """Add (B, n, ...) at the end."""
        end = self.length + x.shape[1]
        if self.room is None or end > self.room.shape[1]:
            self._move(x, 0, max(end, 2 * self.length, self.planned, 16))
        self._write(x, end)
        self.length = end

    def drop(self, count: int) -> None:
        """Forget the first `count` entries."""
        self._move(self.value, count, self.length - count)
        self.length -= count

    def _move(self, like: Tensor, start: int, size: int) -> None:
        """Make room for `size` entries, and bring those from `start` on there."""
        room = self._new(like, (like.shape[0], size, *like.shape[2:]))
        if self.room is not None:
            room[:, : self.length - start] = self.value[:, start:]
        self.room = room

    def _new(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        return like.new_empty(shape)

    def _write(self, x: Tensor, end: int) -> None:
        if self.room is not None:
            self.room[:, self.length : end] = x

    def select(self, rows: Tensor) -> Buffer:
        """The rows `rows` (n,) int64 of the batch, in that order, each as its own copy."""
        chosen = Buffer()
        if self.room is not None:
            chosen.room = self.room.index_select(0, rows.to(self.room.device))
        chosen.length, chosen.planned = self.length, self.planned
        return chosen


def cut(x: Tensor | None, row: int, start: int, end: int) -> Tensor | None:
    """Tokens start to end - 1 of one row of (B, T, ...), still with a batch dimension."""
    return None if x is None else torch.narrow(x[row : row + 1], 1, start, end - start)
