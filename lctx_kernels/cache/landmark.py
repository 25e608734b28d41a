"""Landmark attention token by token: all blocks are kept, and all or the best of them read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tokens

from .._dtypes import autocast, stat_dtype, without_autocast
from ..landmark import landmark_attention
from ..merge import merge_attention
from .blocks import BlockStore
from .buffer import Buffer
from .decode import RopeTable, can_decode, fits_in_shared_memory, landmark_decode

Rope = Callable[[Tensor, Tensor], Tensor]
"""rope(x, positions): x (..., D) rotated to positions, int64, of a shape that broadcasts to x's
without D. Products of rotated vectors depend on the distance of their positions alone."""

SELECT = ("token_and_head", "head", "token")
ROW_ELEMENTS = 1 << 24  # of the keys, or scores, of tokens read at a time; 4 times on a GPU


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
    """Blocks of heads chosen for some tokens, and the queries that read them.

    pairs: (B, T or 1, H, k), block * Hkv + key/value head, blocks in the order of the text; 1 where
    all tokens of a call share a choice; H is Hkv where the heads do, else Hq. queries: (B, T, Hq,
    k, D) rotated to where their blocks see them.
    """

    pairs: Tensor
    queries: Tensor


class RetrievalState:
    """All blocks kept, the best `top_k` of them read: of a token and head, a head, or a token.

    Earlier blocks lie in a store, perhaps in the CPU's memory; their landmarks stay with the
    computation. A call scores the landmarks, fetches the best blocks (of equal ones the later), and
    attends to them and to the tokens of the open block and of this call. Positions never grow: the
    farthest blocks share the first place, the last `top_k` follow in order, then the open block
    (the paper's section 3.2.2). With at most `top_k` blocks stored the result is that of
    `LandmarkState`.

    Keys are stored as rotated to their places inside of their block, once: rotations add up, so a
    block is put elsewhere by rotating the query. Up to 16 tokens without gradient, with a `rope`
    that is a `RopeTable`, are decoded by one op (`cache.decode.landmark_decode`).

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
        self.open: tuple[Tensor, Tensor] | None = None  # k, v (B, Hkv, block_size, D)
        self.open_len = 0
        self.seen = 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: Rope, scale: float | None = None
    ) -> Tensor:
        """Output (B, T, Hq, Dv) of the next T tokens; q and k are not rotated yet."""
        q, k, v = autocast(q), autocast(k), autocast(v)
        self.seen += q.shape[1]
        if self.open is None:
            self.open = self._room(k), self._room(v)
        if isinstance(rope, RopeTable) and self._can_decode(q, k, v, scale):
            return self._decode(q, k, v, rope, scale)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        inside = self.open_len + torch.arange(q.shape[1], device=q.device)[:, None]
        q_own, k_own = rope(q, inside), rope(k, inside)
        pending = None
        if self.store.count:
            with without_autocast(q.device.type):
                chosen = self._choose(q, inside, rope, scale)
                pending = self.store.fetch(chosen.pairs)
        out, lse = landmark_attention(
            q_own, self._with_open(0, k_own), self._with_open(1, v), block_size=self.block_size,
            scale=scale, return_lse=True,
        )  # fmt: skip
        if pending is not None:
            with without_autocast(q.device.type):
                past = _read(chosen.queries.to(out.dtype), *pending.wait(), pending.index, scale)
            out, _ = merge_attention(out, lse, *past)
        if self.open_len + q.shape[1] > self.block_size:
            k_own = rope(k, inside % self.block_size)
        self._keep(k_own, v)
        return out

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens at once: a prompt read in parts copies nothing."""
        self.store.reserve((self.open_len + tokens) // self.block_size)

    def select(self, rows: Tensor) -> RetrievalState:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        store = self.store
        chosen = RetrievalState(
            self.block_size, self.top_k, self.granularity, store.offload, store.max_blocks
        )
        chosen.store, chosen.seen = store.select(rows), self.seen
        if self.open is not None:
            k, v = (x.index_select(0, rows.to(x.device)) for x in self.open)
            chosen.open, chosen.open_len = (k, v), self.open_len
        return chosen

    def _can_decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> bool:
        """Whether the op for decoding does what `attend` is asked for."""
        if not can_decode("landmark_decode", scale, q, k, v, *(self.open or ())):
            return False
        L, read = self.block_size, min(self.top_k, self.store.count) + 2
        if q.is_cuda and not fits_in_shared_memory(q.shape[-1], read * L, read):
            return False
        crosses = self.open_len + q.shape[1] > L
        return not crosses or (self.granularity != "head" and self.store.max_blocks is None)

    def _decode(
        self, q: Tensor, k: Tensor, v: Tensor, rope: RopeTable, scale: float | None
    ) -> Tensor:
        """Tokens up to the end of a block at a time; blocks that this call closed are all read."""
        outs, start, always = [], 0, 0
        table = rope.table.to(stat_dtype(q.dtype))
        while start < q.shape[1]:
            open_k, open_v = room = self.open or (k, v)
            end = min(q.shape[1], start + self.block_size - self.open_len)
            q_new, k_new, v_new = q, k, v
            if end - start < q.shape[1]:
                q_new, k_new, v_new = (x[:, start:end] for x in (q, k, v))
            if self.store.count:
                landmarks, (blocks_k, blocks_v) = self.store.landmarks, self.store.blocks
            else:
                landmarks, blocks_k, blocks_v = k[:, :0], *(x.unsqueeze(1)[:, :0] for x in room)
            out, _, _ = landmark_decode(
                q_new, k_new, v_new, landmarks, blocks_k, blocks_v, open_k, open_v, rope=table,
                open_len=self.open_len, top_k=self.top_k, always=always, select=self.granularity,
                scale=scale,
            )  # fmt: skip
            outs.append(out)
            self.open_len += end - start
            if self.open_len == self.block_size:
                self.store.append(open_k[:, None], open_v[:, None])
                self.open_len, always = 0, always + 1
            start = end
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _room(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[2], self.block_size, x.shape[3])

    def _with_open(self, which: int, x: Tensor) -> Tensor:
        """The open block's keys (0) or values (1), and x (B, T, Hkv, D) after them."""
        if self.open is None or self.open_len == 0:
            return x
        return torch.cat([self.open[which][:, :, : self.open_len].transpose(1, 2), x], dim=1)

    def _keep(self, k: Tensor, v: Tensor) -> None:
        """Whole blocks go to the store, the rest is the open block."""
        L = self.block_size
        k, v = (self._with_open(i, x).transpose(1, 2) for i, x in enumerate((k, v)))
        whole = k.shape[2] // L * L
        if whole:
            blocks = (x[:, :, :whole].unflatten(2, (-1, L)).transpose(1, 2) for x in (k, v))
            self.store.append(*blocks)
        self.open_len = k.shape[2] - whole
        pad = (0, 0, 0, L - self.open_len)
        k, v = (pad_tokens(x[:, :, whole:], pad).contiguous() for x in (k, v))
        self.open = k, v

    def _choose(self, q: Tensor, inside: Tensor, rope: Rope, scale: float) -> Retrieved:
        """The best blocks for queries at `inside` (T, 1) of the open block."""
        B, T, Hq, D = q.shape
        L, landmarks = self.block_size, self.store.landmarks  # (B, count, Hkv, D)
        count, Hkv = landmarks.shape[1:3]
        used = min(self.top_k, count)
        moved = int(count > used)  # earlier blocks share the first place
        start = L * torch.arange(used + moved, device=q.device)  # of the places of blocks
        places = (inside + (used + moved) * L)[:, None] - start  # (T, 1, places)
        turned = rope(q.unsqueeze(3).expand(-1, -1, -1, used + moved, -1), places)
        grouped = turned.to(landmarks.dtype).unflatten(2, (Hkv, -1))  # (B, T, Hkv, G, places, D)
        far, near = landmarks[:, : count - used], landmarks[:, count - used :]
        scores = [torch.einsum("bthgnd,bnhd->bthgn", grouped[..., moved:, :], near)]
        if moved:
            scores.insert(0, torch.einsum("bthgd,bnhd->bthgn", grouped[..., 0, :], far))
        best = scale * torch.cat(scores, dim=-1).flatten(2, 3)
        if self.granularity != "token_and_head":
            together = 1 if self.granularity == "head" else 2
            best = best.log_softmax(-1).amax(together, keepdim=True)
        blocks = largest(best, used)
        place = torch.arange(used, device=q.device)
        if moved:
            place = place + (blocks >= count - used)
        place = place.expand(B, T, Hq, used).unsqueeze(-1).expand(-1, -1, -1, -1, D)
        heads = Hkv if blocks.shape[2] == 1 else Hq
        kv_head = torch.arange(heads, device=q.device) // (heads // Hkv)
        return Retrieved(blocks * Hkv + kv_head[:, None], turned.gather(3, place))


def largest(scores: Tensor, k: int) -> Tensor:
    """Places of the k largest along the last dimension, in order; of equal ones the last.

    In a model's first layer all landmarks have the same key: ties are not rare.

    >>> largest(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), 3)
    tensor([1, 3, 4])
    """
    least = scores.topk(k, dim=-1).values[..., -1:]
    above, equal = scores > least, scores == least
    left = k - above.sum(-1, keepdim=True)
    late = equal.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) <= left
    return (above | (equal & late)).half().topk(k, dim=-1).indices.sort(-1).values


def _read(
    q: Tensor, blocks_k: Tensor, blocks_v: Tensor, index: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries to their chosen blocks, each gated by its landmark: out, lse.

    q: (B, T, Hq, k, D). blocks_k, blocks_v: (B, n, L, D) fetched blocks of single heads; index:
    (B, T or 1, H, k), which of them.
    """
    B, T, Hq, k, D = q.shape
    L, shared = blocks_k.shape[2], index.shape[1] == 1
    gathered = 0 if shared else index.shape[2] * D  # numbers that a token brings along
    room = ROW_ELEMENTS * 4 if q.is_cuda else ROW_ELEMENTS
    step = max(1, room // max(1, B * k * L * max(Hq, gathered)))
    parts = []
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        of = slice(None) if shared else rows
        parts.append(_read_rows(q[:, rows], blocks_k, blocks_v, index[:, of], scale))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1).transpose(1, 2)


def _read_rows(
    q: Tensor, blocks_k: Tensor, blocks_v: Tensor, index: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As _read for a few tokens, with lse (B, T, Hq)."""
    stat = stat_dtype(q.dtype)
    row = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    k, v = (x[row, index].to(stat) for x in (blocks_k, blocks_v))  # (B, T or 1, H, k, L, D)
    grouped = q.to(stat).unflatten(2, (k.shape[2], -1))  # (B, T, H, G, k, D)
    if k.shape[1] == 1:
        scores = scale * torch.einsum("bthgkd,bhkld->bthgkl", grouped, k[:, 0])
    else:
        scores = scale * torch.einsum("bthgkd,bthkld->bthgkl", grouped, k)
    gates, inner = scores[..., -1], scores[..., :-1].softmax(-1)
    lse = gates.logsumexp(-1)
    weights = (gates - lse.unsqueeze(-1)).exp().unsqueeze(-1) * inner
    values = v[..., :-1, :]
    if v.shape[1] == 1:
        out = torch.einsum("bthgkl,bhkld->bthgd", weights, values[:, 0])
    else:
        out = torch.einsum("bthgkl,bthkld->bthgd", weights, values)
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3)
