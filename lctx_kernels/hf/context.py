"""What the backbone of a converted model tells its attention layers about one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cache.landmark import Rope
from ..cache.rows import Span
from ..infini import InfiniMemory


@dataclass
class SegmentMemory:
    """Infini's memories of all layers between the segments of a text, for training.

    Attention layers read those of the segments before and write those after this one; `advance`,
    once the segment's backward is done, makes the written ones the read ones and cuts the gradient.

    >>> memory = SegmentMemory()
    >>> memory.read.get(0) is None
    True
    """

    read: dict[int, InfiniMemory] = field(default_factory=dict)
    written: dict[int, InfiniMemory] = field(default_factory=dict)

    def advance(self) -> None:
        """Go to the next segment."""
        self.read = {
            layer: InfiniMemory(mem.M.detach(), mem.z.detach())
            for layer, mem in self.written.items()
        }
        self.written = {}


@dataclass
class Context:
    """One forward of a converted backbone.

    columns: Columns of the caller's batch.
    spans: Per row the columns, of what the layers see, that hold tokens; None if all do.
    memory: Memories to read and write, in segment-wise training.
    is_landmark: (B, T) bool where landmarks stand anywhere; None if they end every block.
    rope: Rotates to any position, for layers that move keys.
    """

    columns: int
    spans: list[Span] | None = None
    memory: SegmentMemory | None = None
    is_landmark: Tensor | None = None
    rope: Rope | None = None


def token_spans(
    attention_mask: Tensor | None, past: int, T: int, cached: bool, where: str
) -> list[Span] | None:
    """Columns of each row that hold tokens, or None if all do or if it makes no difference.

    Without a cache, pads on the right make none: no token sees a later one.

    Args:
        attention_mask: (B, past + T), 1 for tokens and 0 for pads, or None.
        past: Columns seen before.
        T: Columns of this forward.
        cached: Whether a later forward will see what this one leaves behind.
        where: Class name for errors.

    Raises:
        TypeError, ValueError: A mask of another kind or shape, or with a hole between tokens.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"{where}: attention_mask is {type(attention_mask).__name__}; expected None or a "
            "tensor (B, T) of ones for tokens and zeros for pads"
        )
    if attention_mask.dim() != 2:
        raise ValueError(
            f"{where}: attention_mask has {attention_mask.dim()} dimensions; expected 2, (B, T): "
            "the attention of this model has a visibility of its own"
        )
    if attention_mask.shape[1] != past + T:
        raise ValueError(
            f"{where}: attention_mask has {attention_mask.shape[1]} columns; expected {past + T}, "
            f"{past} seen before and {T} new ones"
        )
    new = attention_mask[:, past:].bool()
    if new.all():
        return None
    count = new.sum(1)
    start = new.int().argmax(1)  # of the first token; 0 where a row has none
    end = start + count
    columns = torch.arange(T, device=new.device)
    solid = (columns >= start[:, None]) & (columns < end[:, None])
    if not torch.equal(solid, new):
        raise ValueError(
            f"{where}: attention_mask has pads between the tokens of a row; expected pads before "
            "or after them"
        )
    if not cached and not bool(start.any()):
        return None
    return list(zip(start.tolist(), end.tolist(), strict=True))


def require_running_positions(
    position_ids: Tensor | None, spans: Sequence[Span] | None, where: str
) -> None:
    """Refuse position_ids that do not run through every row: packed texts would see each other.

    Raises:
        NotImplementedError: Positions that jump between the tokens of a row.
    """
    if position_ids is None or position_ids.shape[-1] < 2:
        return
    runs = position_ids.diff(dim=-1) == 1
    if spans is not None:
        runs = runs.expand(len(spans), -1).clone()
        for row, (start, end) in enumerate(spans):
            outside = torch.ones_like(runs[0])
            outside[start : max(end - 1, start)] = False
            runs[row] |= outside
    message = (
        f"{where}: position_ids jump inside a row; expected positions that count up by 1: several "
        "texts packed into one row would read each other's memory; nearest is one text per row"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(runs.all(), message)
    elif not bool(runs.all()):
        raise NotImplementedError(message)
