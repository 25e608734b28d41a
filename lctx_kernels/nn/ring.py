"""Self-attention over texts that lie on the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cache import RingState
from ..cp.groups import Ranks, process_group
from ..cp.plan import Plan, make_plan
from ..cp.shard import shard_positions
from ..ring import ring_attention
from .attention import SelfAttention


class RingAttention(SelfAttention):
    """Dense causal self-attention of one text whose tokens are split over ranks.

    The parameters are those of `FullAttention`.

    Args:
        d_model, num_heads: As in `SelfAttention`, whose other options are taken too.
        group: ProcessGroup, 1-D DeviceMesh such as mesh["cp"], or None for the default group.
        layout: "zigzag", "striped" or "contiguous", for calls without a plan.
        window: Position i sees key j only if i - j < window (tokens); None is no limit.
        deterministic: Bitwise equal gradients from run to run.
        transport, timeout: As in `ring_attention`.

    Source: Liu et al. 2023 (arXiv 2310.01889), algorithm 1.

    >>> import torch
    >>> import torch.distributed as dist
    >>> from lctx_kernels.nn import FullAttention
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> ring, x = RingAttention(64, 4), torch.randn(2, 10, 64)
    >>> alone = FullAttention(64, 4)
    >>> alone.load_state_dict(ring.state_dict())
    <All keys matched successfully>
    >>> torch.allclose(ring(x), alone(x), atol=1e-5)
    True
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        group: Any = None,
        layout: str = "zigzag",
        window: int | None = None,
        deterministic: bool = True,
        transport: str = "auto",
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        self.ranks, self.layout, self.window = Ranks(group), layout, window
        self.deterministic, self.transport, self.timeout = deterministic, transport, timeout

    def new_state(self) -> RingState:
        """An empty state for `forward(x, state)`: each rank keeps its part of keys and values."""
        return RingState(self.ranks.group, self.window)

    def plan(self, length: int) -> Plan:
        """The plan of a text of which every rank has `length` tokens."""
        size = process_group(self.ranks.group, "RingAttention").size()
        return make_plan(length * size, size, layout=self.layout)

    def forward(
        self, x: Tensor, state: RingState | None = None, plan: Plan | None = None
    ) -> Tensor:
        """x (B, L, d_model), this rank's tokens of the plan, to the same shape.

        With a state, the first x is the prompt, and every later one (B, T, d_model) of the next
        tokens, the same on every rank.

        Raises:
            ValueError: Another number of ranks or tokens than the plan's; or a plan for tokens
                behind a prompt.
            NotImplementedError: Gradients of tokens behind a prompt.
        """
        if state is not None and state.seen:
            return self._next(x, state, plan)
        group = process_group(self.ranks.group, "RingAttention")
        plan, rank = plan or self.plan(x.shape[1]), group.rank()
        if plan.world_size != group.size() or plan.lengths[rank] != x.shape[1]:
            raise ValueError(
                f"RingAttention: this rank has {x.shape[1]} tokens, rank {rank} of {group.size()}; "
                f"expected its part of the plan of {plan.world_size} ranks, {plan.lengths}; try "
                "cp.shard(plan, x, 1, rank)"
            )
        q, k, v = self.project(x)
        positions = shard_positions(plan, rank).to(x.device)[None, :, None]
        q, k = self.rope(q, positions), self.rope(k, positions)
        heads = ring_attention(
            q, k, v, group=group, plan=plan,
            window=self.window, deterministic=self.deterministic, transport=self.transport,
            timeout=self.timeout,
        )  # fmt: skip
        if state is not None:
            state.read(plan, rank, k.detach(), v.detach())
        return self.output(heads)

    def _next(self, x: Tensor, state: RingState, plan: Plan | None) -> Tensor:
        if plan is not None:
            raise ValueError(
                f"RingAttention: a plan is given for tokens behind a prompt of {state.seen}; "
                "expected None and the same tokens on every rank, or a new state"
            )
        q, k, v = self.project(x)
        positions = torch.arange(state.seen, state.seen + x.shape[1], device=x.device)
        q, k = (self.rope(y, positions[None, :, None]) for y in (q, k))
        return self.output(state.attend(q, k, v))
