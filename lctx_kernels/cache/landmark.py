"""Landmark attention token by token: all blocks are kept, and all or the best of them read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import stat_dtype, without_autocast
from ..landmark import landmark_attention
from ..merge import merge_attention
from .blocks import BlockStore
from .buffer import Buffer

Rope = Callable[[Tensor, Tensor], Tensor]
"""rope(x, positions): x (..., D) rotated to positions, int64, of a shape that broadcasts to x's
without D."""

SELECT = ("token_and_head", "head", "token")
ROW_ELEMENTS = 1 << 24  # elements of retrieved keys that exist at a time


class LandmarkState:
    """All keys and values of everything read; every block can be read by every token.

    Args:
        block_size: Length of a block (tokens, >= 2, the landmark counted); None where landmarks
            stand anywhere and `attend` gets `is_landmark`.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.1.
    Equivalent to: one call of lctx_kernels.landmark_attention on all tokens.

    >>> q, k, v = torch.randn(3, 1, 11, 2, 8)
    >>> state = LandmarkState(block_size=4)
    >>> parts = [state.attend(*(x[:, i : i + 3] for x in (q, k, v))) for i in range(0, 11, 3)]
    >>> out = landmark_attention(q, k, v, block_size=4)
    >>> torch.allclose(torch.cat(parts, dim=1), out, atol=1e-5)
    True
    """

    def __init__(self, block_size: int | None = None) -> None:
        self.block_size = block_size
        self.k, self.v, self.marks = Buffer(), Buffer(), Buffer()
        self.seen = 0

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rope: Rope | None = None,
        is_landmark: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Output (B, T, Hq, Dv) of the next T tokens.

        Args:
            q: (B, T, Hq, Dk) queries, k: (B, T, Hkv, Dk) keys, v: (B, T, Hkv, Dv) values.
            rope: Rotates q and k to their positions; None if they are rotated already.
            is_landmark: (B, T) bool, which of these tokens are landmarks; with block_size None.
            scale: Factor on the scores; None is Dk**-0.5.
        """
        start, self.seen = self.seen, self.seen + q.shape[1]
        if rope is not None:
            positions = torch.arange(start, self.seen, device=q.device)[:, None]
            q, k = rope(q, positions), rope(k, positions)
        self.k.append(k)
        self.v.append(v)
        if is_landmark is not None:
            self.marks.append(is_landmark)
        marks = None if is_landmark is None else self.marks.value
        return landmark_attention(
            q, self.k.value, self.v.value, block_size=self.block_size, is_landmark=marks,
            scale=scale,
        )  # fmt: skip

    def select(self, rows: Tensor) -> LandmarkState:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        chosen = LandmarkState(self.block_size)
        chosen.k, chosen.v = self.k.select(rows), self.v.select(rows)
        chosen.marks, chosen.seen = self.marks.select(rows), self.seen
        return chosen


class Retrieved(NamedTuple):
    """Blocks of heads chosen for some tokens, and the positions of their first tokens.

    Both (B, T or 1, H, k): 1 where all tokens of a call share a choice; H is Hkv where the heads
    do, else Hq. pairs: block * Hkv + key/value head, blocks in the order of the text.
    """

    pairs: Tensor
    positions: Tensor


class RetrievalState:
    """All blocks kept, the best `top_k` of them read: of a token and head, a head, or a token.

    Earlier blocks lie in a store, perhaps in the CPU's memory; their landmarks stay with the
    computation. A call scores the landmarks, fetches the best blocks, and attends to them and to
    the tokens of the open block and of this call. Positions never grow: the farthest blocks share
    the first place, the last `top_k` follow in order, then the open block (the paper's section
    3.2.2). With at most `top_k` blocks stored the result is that of `LandmarkState`.

    Memory: 2 block_size Hkv D elements per block in the store, Hkv D per block beside it.

    Args:
        block_size: Length of a block (tokens, >= 2, the landmark counted).
        top_k: Blocks to read (>= 1).
        select: Whose choice it is: "token_and_head"; "token", one choice for all heads; or "head",
            one choice for all tokens of a call, which therefore depends on the last of them too:
            cheapest for generation, not meant for measuring perplexity.
        offload: Keep blocks in the CPU's memory, pinned if the computation is on a GPU.
        max_blocks: Blocks to keep, the oldest are forgotten first; None is no limit.

    Raises:
        ValueError: A number that is too small, or another name for `select`.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.2.

    >>> q, k, v = torch.randn(3, 1, 40, 2, 8)
    >>> state = RetrievalState(block_size=4, top_k=2)
    >>> for i in range(0, 40, 8):
    ...     out = state.attend(*(x[:, i : i + 8] for x in (q, k, v)), rope=lambda x, positions: x)
    >>> out.shape, state.store.count
    (torch.Size([1, 8, 2, 8]), 10)
    """

    def __init__(
        self,
        block_size: int,
        top_k: int,
        select: str = "token_and_head",
        offload: bool = False,
        max_blocks: int | None = None,
    ) -> None:
        for name, value, least in (
            ("block_size", block_size, 2), ("top_k", top_k, 1), ("max_blocks", max_blocks, 1)
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"RetrievalState: {name} is {value}; expected at least {least}")
        if select not in SELECT:
            raise ValueError(
                f"RetrievalState: select is {select!r}; expected one of {', '.join(SELECT)}"
            )
        self.block_size, self.top_k, self.granularity = block_size, top_k, select
        self.store = BlockStore(block_size, offload, max_blocks)
        self.tail: tuple[Tensor, Tensor] | None = None  # k, v of the open block
        self.seen = 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Rope, scale: float | None = None
    ) -> Tensor:
        """Output (B, T, Hq, Dv) of the next T tokens; q and k are not rotated yet."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.seen += q.shape[1]
        if self.tail is not None:
            k, v = (torch.cat([old, x], dim=1) for old, x in zip(self.tail, (k, v), strict=True))
        count = self.store.count
        used = min(self.top_k, count)
        prefix = (count if count == used else used + 1) * self.block_size
        positions = torch.arange(prefix, prefix + k.shape[1], device=q.device)[:, None]
        q = rope(q, positions[-q.shape[1] :])
        pending = None
        if used:
            with without_autocast(q.device.type):
                chosen = self._choose(q, used, rope, scale)
                pending = self.store.fetch(chosen.pairs)
        out, lse = landmark_attention(
            q, rope(k, positions), v, block_size=self.block_size, scale=scale, return_lse=True
        )
        if pending is not None:
            with without_autocast(q.device.type):
                blocks_k, blocks_v = pending.wait()
                past = _read(
                    q.to(out.dtype), blocks_k, blocks_v, pending.index, chosen.positions, rope,
                    scale,
                )  # fmt: skip
            out, _ = merge_attention(out, lse, *past)
        self._keep(k, v, rope)
        return out

    def select(self, rows: Tensor) -> RetrievalState:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        store = self.store
        chosen = RetrievalState(
            self.block_size, self.top_k, self.granularity, store.offload, store.max_blocks
        )
        chosen.store, chosen.seen = store.select(rows), self.seen
        if self.tail is not None:
            k, v = (x.index_select(0, rows.to(x.device)) for x in self.tail)
            chosen.tail = (k, v)
        return chosen

    def _keep(self, k: Tensor, v: Tensor, rope: Rope) -> None:
        """Whole blocks go to the store, the rest is the open block."""
        L = self.block_size
        whole = k.shape[1] // L * L
        if whole:
            landmarks = k[:, L - 1 : whole : L]
            place = torch.full((1, 1), L - 1, device=k.device)
            self.store.append(k[:, :whole], v[:, :whole], rope(landmarks, place))
        self.tail = (k[:, whole:], v[:, whole:]) if whole < k.shape[1] else None

    def _choose(self, q: Tensor, used: int, rope: Rope, scale: float) -> Retrieved:
        """The best `used` blocks for rotated queries, and where their tokens are placed."""
        B, T, Hq, D = q.shape
        L, landmarks = self.block_size, self.store.landmarks  # (B, count, Hkv, D)
        count, Hkv = landmarks.shape[1:3]
        slot = torch.arange(used, device=q.device) + (count > used)
        near = rope(landmarks[:, count - used :], (slot * L + L - 1)[:, None])
        far = self.store.far_landmarks[:, : count - used]
        grouped = q.to(near.dtype).view(B, T, Hkv, Hq // Hkv, D)
        scores = torch.cat(
            [torch.einsum("bthgd,bnhd->bthgn", grouped, keys) for keys in (far, near)], dim=-1
        )
        scores = scale * scores.flatten(2, 3)
        if self.granularity == "head":
            scores = scores.softmax(-1).amax(1, keepdim=True)
        elif self.granularity == "token":
            scores = scores.softmax(-1).amax(2, keepdim=True)
        blocks = scores.topk(used, dim=-1).indices.sort(-1).values
        place = torch.arange(used, device=q.device)
        if count > used:
            place = place + (blocks >= count - used)
        heads = Hkv if blocks.shape[2] == 1 else Hq
        kv_head = torch.arange(heads, device=q.device) // (heads // Hkv)
        positions = (place * L).expand_as(blocks).expand(-1, -1, heads, -1)
        return Retrieved(blocks * Hkv + kv_head[:, None], positions)


def _read(
    q: Tensor, blocks_k: Tensor, blocks_v: Tensor, index: Tensor, positions: Tensor, rope: Rope,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of rotated queries to their chosen blocks, each gated by its landmark: out, lse.

    blocks_k, blocks_v: (B, n, L, D) fetched blocks of single heads; index and positions: (B, T or
    1, H, k), which of them, and where they are placed.
    """
    B, T, Hq, D = q.shape
    step = max(1, ROW_ELEMENTS // max(1, B * Hq * index.shape[-1] * blocks_k.shape[2] * D))
    parts = []
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        of = slice(None) if index.shape[1] == 1 else rows
        parts.append(
            _read_rows(q[:, rows], blocks_k, blocks_v, index[:, of], positions[:, of], rope, scale)
        )
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1).transpose(1, 2)


def _read_rows(
    q: Tensor, blocks_k: Tensor, blocks_v: Tensor, index: Tensor, positions: Tensor, rope: Rope,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As _read for a few tokens, with lse (B, T, Hq)."""
    L, stat = blocks_k.shape[2], stat_dtype(q.dtype)
    row = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    k, v = (x[row, index] for x in (blocks_k, blocks_v))  # (B, T or 1, H, k, L, D)
    k = rope(k, positions.unsqueeze(-1) + torch.arange(L, device=q.device)).to(stat)
    grouped = q.to(stat).unflatten(2, (k.shape[2], -1))  # (B, T, H, G, D)
    if k.shape[1] == 1:
        scores = scale * torch.einsum("bthgd,bhkld->bthgkl", grouped, k[:, 0])
    else:
        scores = scale * torch.einsum("bthgd,bthkld->bthgkl", grouped, k)
    gates, inner = scores[..., -1], scores[..., :-1].softmax(-1)
    lse = gates.logsumexp(-1)
    weights = (gates - lse.unsqueeze(-1)).exp().unsqueeze(-1) * inner
    values = v[..., :-1, :].to(stat)
    if v.shape[1] == 1:
        out = torch.einsum("bthgkl,bhkld->bthgd", weights, values[:, 0])
    else:
        out = torch.einsum("bthgkl,bthkld->bthgd", weights, values)
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3)
