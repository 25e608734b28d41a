"""Self-attention layers: dense, with Infini's memory, with landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_options
from ..cache import FlashState, InfiniState, LandmarkState, RetrievalState, RopeTable, Rows
from ..cache.rows import Span
from ..flash import flash_attention
from ..infini import InfiniMemory, infini_attention
from ..landmark import landmark_attention
from .gate import MemoryGate
from .rotary import Rotary


class SelfAttention(nn.Module):
    """Projections, norms and positions that all layers share; `FullAttention` is the plain one.

    Args:
        d_model: Width of the layer's input and output.
        num_heads: Query heads.
        num_kv_heads: Key/value heads, a divisor of num_heads; None is num_heads.
        head_dim: Dimension of a head; None is d_model // num_heads.
        rope_base: Base of the rotary embedding; None is no position embedding.
        qk_norm: RMS norms of queries and keys over the head dimension.
        bias: Biases in the projections.
        dropout: Probability of dropping an element of the output, in training.

    Raises:
        TypeError: A size that is no int.
        ValueError: Sizes below 1, or numbers of heads that do not divide.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        qk_norm: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require_options(
            name, d_model=d_model, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )  # fmt: skip
        if head_dim is None and d_model % num_heads:
            raise ValueError(
                f"{name}: d_model is {d_model}, num_heads is {num_heads}; expected a multiple, or "
                "head_dim"
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: num_heads is {num_heads}, num_kv_heads is {num_kv_heads}; expected a "
                "multiple"
            )
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.head_dim = head_dim or d_model // num_heads
        self.q_proj = nn.Linear(d_model, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, d_model, bias=bias)
        self.q_norm: nn.Module = nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.rotary = None if rope_base is None else Rotary(self.head_dim, rope_base)
        self.dropout = nn.Dropout(dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, Hq, D), k and v (B, T, Hkv, D), normed but not rotated.

        Raises:
            ValueError: Another shape than (B, T, d_model).
        """
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; expected (B, T, d_model) "
                f"with d_model = {self.d_model}"
            )
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q), self.k_norm(k), v

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (..., D) at the positions, which broadcast to its shape without D."""
        return x if self.rotary is None else self.rotary(x, positions)

    def output(self, heads: Tensor) -> Tensor:
        """(B, T, Hq, D) to (B, T, d_model)."""
        y: Tensor = self.dropout(self.o_proj(heads.flatten(2)))
        return y

    def positions(self, x: Tensor, state: Rows[Any] | None, spans: Sequence[Span] | None) -> Tensor:
        """(B or 1, T, 1) positions of tokens in their rows, pads and what was seen counted off."""
        columns = torch.arange(x.shape[1], device=x.device)[None, :, None]
        if state is None and spans is None:
            return columns
        B = x.shape[0]
        seen = [0] * B if state is None else state.lengths(B)
        starts = [0] * B if spans is None else [start for start, _ in spans]
        shift = torch.tensor(
            [n - start for n, start in zip(seen, starts, strict=True)], device=x.device
        )
        return columns + shift[:, None, None]


class FullAttention(SelfAttention):
    """Dense causal self-attention, the layer that the others are compared with.

    >>> FullAttention(64, 4)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def new_state(self) -> Rows[FlashState]:
        """An empty state for `forward(x, state)`."""
        return Rows(FlashState)

    def forward(
        self,
        x: Tensor,
        state: Rows[FlashState] | None = None,
        spans: Sequence[Span] | None = None,
    ) -> Tensor:
        """x (B, T, d_model) to the same shape; with a state, x are the next tokens."""
        q, k, v = self.project(x)
        positions = self.positions(x, state, spans)
        q, k = self.rope(q, positions), self.rope(k, positions)
        if state is None and spans is None:
            return self.output(flash_attention(q, k, v))
        return self.output((state or self.new_state()).attend(q, k, v, spans=spans))


class InfiniAttention(SelfAttention):
    """Self-attention inside segments, gated with a memory of all earlier segments.

    The memory sees queries and keys without position embedding; positions restart in every segment.

    Args:
        d_model, num_heads: As in `SelfAttention`, and its keyword arguments as `options`.
        segment_len: Length of a segment (tokens, >= 1).
        update: "linear" or "delta".
        first: "gate" or "bypass": what the first segment gives while there is no memory.
        detach_every: n > 0 cuts the gradient through the memory every n segments; 0 never.
        gate_init: First value of the gates' logits (`MemoryGate`).

    Source: Munkhdalai et al. 2024 (arXiv 2404.07143), section 2.1.
    Equivalent to: lctx_kernels.infini_attention between projections.

    >>> layer = InfiniAttention(64, 4, segment_len=8)
    >>> layer(torch.randn(2, 20, 64)).shape
    torch.Size([2, 20, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        segment_len: int = 2048,
        update: str = "linear",
        first: str = "gate",
        detach_every: int = 0,
        gate_init: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        require_options(
            "InfiniAttention", segment_len=segment_len, update=update, first=first,
            detach_every=detach_every,
        )  # fmt: skip
        self.segment_len, self.update, self.first = segment_len, update, first
        self.detach_every = detach_every
        self.memory_gate = MemoryGate(num_heads, gate_init)

    def new_state(self) -> Rows[InfiniState]:
        """An empty state for `forward(x, state)`: constant in size, however much is read."""
        return Rows(partial(InfiniState, self.segment_len, self.update, self.first))

    def forward(
        self,
        x: Tensor,
        state: Rows[InfiniState] | None = None,
        spans: Sequence[Span] | None = None,
    ) -> Tensor:
        """x (B, T, d_model) to the same shape; with a state, x are the next tokens."""
        if state is None and spans is None:
            return self.with_memory(x)[0]
        q_mem, k_mem, v = self.project(x)
        positions = self.positions(x, state, spans) % self.segment_len
        q, k = self.rope(q_mem, positions), self.rope(k_mem, positions)
        state = state or self.new_state()
        gate = self.memory_gate(x)
        return self.output(state.attend(q, k, v, spans=spans, q_mem=q_mem, k_mem=k_mem, gate=gate))

    def with_memory(
        self, x: Tensor, mem: InfiniMemory | None = None
    ) -> tuple[Tensor, InfiniMemory]:
        """x (B, T, d_model), which starts a segment, to output and memory after it.

        For training segment by segment, with a gradient through `mem` if it has one.
        """
        q_mem, k_mem, v = self.project(x)
        positions = torch.arange(x.shape[1], device=x.device)[None, :, None] % self.segment_len
        out, mem = infini_attention(
            self.rope(q_mem, positions), self.rope(k_mem, positions), v, mem,
            gate=self.memory_gate(x), q_mem=q_mem, k_mem=k_mem, segment_len=self.segment_len,
            update=self.update, first=self.first, detach_every=self.detach_every,
        )  # fmt: skip
        return self.output(out), mem


class LandmarkAttention(SelfAttention):
    """Self-attention with a grouped softmax: each earlier block is gated by its landmark token.

    The input already holds the landmark tokens (`lctx_kernels.data.landmarks`).

    Args:
        d_model, num_heads: As in `SelfAttention`, and its keyword arguments as `options`.
        block_size: Every block_size-th token is a landmark (tokens, >= 2).
        top_k: Blocks that generation retrieves; None reads all.
        select: Whose choice that is: "token_and_head", "head" or "token" (`RetrievalState`).
        offload: Whether generation keeps blocks in the CPU's memory.
        max_blocks: Blocks that generation keeps; None is no limit.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.
    Equivalent to: lctx_kernels.landmark_attention between projections.

    >>> layer = LandmarkAttention(64, 4, block_size=8)
    >>> layer(torch.randn(2, 20, 64)).shape
    torch.Size([2, 20, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        block_size: int = 64,
        top_k: int | None = None,
        select: str = "token_and_head",
        offload: bool = False,
        max_blocks: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        self.block_size, self.top_k, self.select = block_size, top_k, select
        self.offload, self.max_blocks = offload, max_blocks
        require_options("LandmarkAttention", block_size=block_size)
        self.new_state()  # refuses the other options
        self._known_table: RopeTable | None = None

    def new_state(self) -> Rows[Any]:
        """An empty state for `forward(x, state)`."""
        options = (self.block_size, self.top_k, self.select, self.offload, self.max_blocks)
        return Rows(partial(landmark_state, *options))

    def forward(
        self,
        x: Tensor,
        state: Rows[Any] | None = None,
        spans: Sequence[Span] | None = None,
        is_landmark: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, d_model) to the same shape; with a state, x are the next tokens.

        is_landmark: (B, T) bool, landmarks anywhere instead of at the end of every block; only
            without a state.
        """
        q, k, v = self.project(x)
        if state is None and spans is None:
            positions = torch.arange(x.shape[1], device=x.device)[None, :, None]
            return self.output(
                landmark_attention(
                    self.rope(q, positions), self.rope(k, positions), v, is_landmark=is_landmark,
                    block_size=self.block_size if is_landmark is None else None,
                )
            )  # fmt: skip
        if is_landmark is not None:
            raise NotImplementedError(
                "LandmarkAttention: is_landmark is given with a state or spans; expected landmarks "
                "at the end of every block there; nearest is is_landmark=None"
            )
        state = state or Rows(partial(LandmarkState, self.block_size))
        rope = self.rope if self.top_k is None else self._table(q)
        return self.output(state.attend(q, k, v, spans=spans, rope=rope))

    def _table(self, q: Tensor) -> RopeTable:
        """Rotations to all places where retrieval puts tokens, which are few."""
        size = ((self.top_k or 0) + 2) * self.block_size + q.shape[1]
        known = self._known_table
        if known is None or known.table.shape[1] < size or not known.fits(q):
            self._known_table = known = RopeTable.of(self.rope, self.head_dim, size, q)
        return known


def landmark_state(
    block_size: int, top_k: int | None, select: str, offload: bool, max_blocks: int | None
) -> LandmarkState | RetrievalState:
    """The state for these options; those of retrieval need `top_k`."""
    if top_k is not None:
        return RetrievalState(block_size, top_k, select, offload, max_blocks)
    if offload or max_blocks is not None:
        raise ValueError(
            f"landmarks: offload is {offload}, max_blocks is {max_blocks} without top_k; expected "
            "top_k, the number of blocks to retrieve; try top_k=4"
        )
    return LandmarkState(block_size)
