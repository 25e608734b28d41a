"""Dense attention token by token over a text whose keys lie on the ranks of a group."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import torch
from torch import Tensor

from ..cp.decode import decode_attention
from ..cp.groups import process_group
from ..cp.plan import Plan
from ..cp.shard import shard_positions
from .buffer import Buffer


class RingState:
    """This rank's part of the keys and values of a text that all ranks have read.

    A prompt comes from `ring_attention`, as the ranks' rows of a plan, by `read`. What follows, or
    a text without a prompt, is the same on every rank, by `attend`; its keys go to the rank that
    has the fewest, so that the parts grow alike.

    Args:
        group: ProcessGroup, 1-D DeviceMesh, or None for the default group.
        window: As in `ring_attention`.

    Source: Liu et al. 2023 (arXiv 2310.01889), whose inference moves keys; here only partial
        results of the new queries travel.
    Equivalent to: FlashState on the whole text.

    >>> import torch
    >>> import torch.distributed as dist
    >>> from lctx_kernels import cp, flash_attention
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k, v = torch.randn(3, 1, 11, 2, 8)
    >>> state = RingState()
    >>> state.read(cp.make_plan(9, 1), 0, k[:, :9], v[:, :9])
    >>> out = state.attend(q[:, 9:], k[:, 9:], v[:, 9:])
    >>> torch.allclose(out, flash_attention(q, k, v)[:, 9:], atol=1e-5)
    True
    >>> dist.destroy_process_group()
    """

    def __init__(self, group: Any = None, window: int | None = None) -> None:
        self.group, self.window = group, window
        self.k, self.v = Buffer(), Buffer()
        self.seen, self.begin = 0, 0  # tokens of the text; the first that is not of another text
        self.rank, self.lengths = 0, [0]  # tokens of every rank
        self.held: collections.deque[range] = collections.deque()  # positions, ascending
        self.passed = 0  # rows before those of `held`

    def read(self, plan: Plan, rank: int, k: Tensor, v: Tensor) -> None:
        """Keep this rank's rows of a prompt; the text goes on where the plan's last document ends.

        Raises:
            ValueError: The state has read before.
        """
        if self.seen:
            raise ValueError(
                f"RingState: {self.seen} tokens have been read; expected the prompt once and whole"
            )
        ranges = [p for p in plan.ranges[rank] if len(p)]
        if any(a[-1] >= b[0] for a, b in itertools.pairwise(ranges)):
            positions, order = shard_positions(plan, rank).sort()
            k, v = (x.index_select(1, order.to(x.device)) for x in (k, v))
            ranges = [range(p, p + 1) for p in positions.tolist()]
        self.k.append(k)
        self.v.append(v)
        self.seen, self.begin, self.rank = plan.seq_len, plan.documents[-2], rank
        self.lengths, self.held = list(plan.lengths), collections.deque(ranges)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Output (B, T, Hq, Dv) of the next T tokens, the same on every rank.

        Raises:
            TypeError, ValueError, NotImplementedError, RingError: As `cp.decode_attention`.
        """
        if not self.seen:
            group = process_group(self.group, "RingState")
            self.rank, self.lengths = group.rank(), [0] * group.size()
            self.k.append(k[:, :0])
            self.v.append(v[:, :0])
        if self.window is not None and q.shape[1] > 1:  # their windows begin at different keys
            tokens = zip(*(x.split(1, dim=1) for x in (q, k, v)), strict=True)
            return torch.cat([self.attend(*token, scale=scale) for token in tokens], dim=1)
        owner = min(range(len(self.lengths)), key=self.lengths.__getitem__)
        if owner == self.rank:
            self.k.append(k)
            self.v.append(v)
            self.held.append(range(self.seen, self.seen + k.shape[1]))
        self.lengths[owner] += k.shape[1]
        self.seen += k.shape[1]
        first = self._first_seen()
        return decode_attention(
            q, self.k.since(first), self.v.since(first), group=self.group, scale=scale,
            causal=owner == self.rank,
        )  # fmt: skip

    def _first_seen(self) -> int:
        """This rank's first row that the last token sees."""
        begin = self.begin
        if self.window is not None:
            begin = max(begin, self.seen - self.window)
        while self.held and self.held[0][-1] < begin:
            self.passed += len(self.held.popleft())
        if not self.held or self.held[0][0] >= begin:
            return self.passed
        part = self.held[0]
        return self.passed + len(range(part.start, begin, part.step))

    def select(self, rows: Tensor) -> RingState:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        chosen = RingState(self.group, self.window)
        vars(chosen).update(vars(self))
        chosen.k, chosen.v = self.k.select(rows), self.v.select(rows)
        chosen.lengths, chosen.held = list(self.lengths), collections.deque(self.held)
        return chosen
