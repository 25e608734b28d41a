"""States of a batch: one for all rows while they march together, else one for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .buffer import cut

Span = tuple[int, int]


class State(Protocol):
    """What `Rows` needs of a layer's state."""

    seen: int

    @property
    def attend(self) -> Callable[..., Tensor]:
        """attend(q, k, v, **options): output (B, T, Hq, Dv) of the next T tokens."""

    def select(self, rows: Tensor) -> Any:
        """A state with the given rows of the batch."""


S = TypeVar("S", bound=State)


class Rows(Generic[S]):
    """The states of one layer for a batch that may be padded.

    As long as no row is padded there is one state for the whole batch. The first padded call gives
    every row a state of its own: each row then sees exactly what it would see alone in a batch.

    Args:
        make: Makes an empty state.

    >>> from lctx_kernels.cache import InfiniState
    >>> rows = Rows(lambda: InfiniState(segment_len=4))
    >>> q, k, v = torch.randn(3, 2, 6, 2, 8)
    >>> out = rows.attend(q, k, v, spans=[(0, 6), (2, 6)])  # the second row has two pads before it
    >>> [state.seen for state in rows.states]
    [6, 4]
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self.make = make
        self.states: list[S] = [make()]
        self.ragged = False
        self.batch: int | None = None  # rows; None before the first call

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, spans: Sequence[Span] | None, **options: Any
    ) -> Tensor:
        """Attention of the next tokens, those outside of a row's span [start, end) left out.

        Args:
            q: (B, T, Hq, Dk) queries, k: (B, T, Hkv, Dk) keys, v: (B, T, Hkv, Dv) values.
            spans: Per row the columns that hold tokens; None if all do. Pads have output 0.
            options: Passed to the states; tensors with B rows and T columns are cut like q.

        Returns:
            (B, T, Hq, Dv).

        Raises:
            ValueError: Another number of rows than so far.
        """
        if self.batch not in (None, q.shape[0]):
            raise ValueError(
                f"{type(self.states[0]).__name__}: the next tokens are of {q.shape[0]} rows, those "
                f"before of {self.batch}; expected equal numbers; try select(rows), or a new state"
            )
        self.batch = q.shape[0]
        if spans is None and not self.ragged:
            return self.states[0].attend(q, k, v, **options)
        B, T = q.shape[:2]
        self._split(B)
        out = q.new_zeros(B, T, q.shape[2], v.shape[-1])
        for row, (start, end) in enumerate(spans or [(0, T)] * B):
            if start == end:
                continue
            cut_options = {
                name: cut(x, row, start, end) if _per_token(x, B, T) else x
                for name, x in options.items()
            }
            tokens = [x[row : row + 1, start:end] for x in (q, k, v)]
            part = self.states[row].attend(*tokens, **cut_options)
            out[row : row + 1, start:end] = part.to(out.dtype)
        return out

    def lengths(self, B: int) -> list[int]:
        """Tokens that each of B rows has seen."""
        return [s.seen for s in self.states] if self.ragged else [self.states[0].seen] * B

    def select(self, rows: Tensor) -> None:
        """Reorder, repeat or drop rows: row i becomes what row rows[i] was."""
        self.batch = None if self.batch is None else rows.numel()
        if not self.ragged:
            self.states[0] = self.states[0].select(rows)
            return
        only = torch.zeros(1, dtype=torch.int64)
        self.states = [self.states[int(row)].select(only) for row in rows]

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.ragged, self.batch = [self.make()], False, None

    def _split(self, B: int) -> None:
        if not self.ragged:
            whole = self.states[0]
            self.states = [whole.select(torch.tensor([row])) for row in range(B)]
            self.ragged = True


def _per_token(x: Any, B: int, T: int) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 2 and x.shape[:2] == (B, T)
