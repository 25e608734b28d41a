"""Decoding kernels: a few new tokens over what a state holds, in one to four launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .. import _load
from .._dtypes import stat_dtype
from .._ops import needs_grad
from ..nn.rotary import rotate

TOKENS = 16  # of a call that decoding kernels take
SHARED_BYTES = 224 * 1024  # of a thread block on a GPU, of which 8 share a row


class RopeTable:
    """A rotary embedding as a table, which decoding kernels read.

    Args:
        table: (2, size, D) cos and sin at positions 0 to size - 1, pairs are the halves of D.

    >>> angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    >>> rope = RopeTable(torch.stack([angle.cos(), angle.sin()]))
    >>> rope(torch.ones(1, 5, 2, 4), torch.arange(5)[:, None]).shape
    torch.Size([1, 5, 2, 4])
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table

    @classmethod
    def of(
        cls, rope: Callable[[Tensor, Tensor], Tensor], head_dim: int, size: int, like: Tensor
    ) -> RopeTable:
        """The table of any rope(x, positions) that rotates the halves of D, on like's device."""
        half = torch.zeros(size, head_dim, device=like.device, dtype=stat_dtype(like.dtype))
        half[:, : head_dim // 2] = 1
        cos, sin = rope(half, torch.arange(size, device=like.device)).chunk(2, dim=-1)
        return cls(torch.stack([torch.cat([x, x], dim=-1) for x in (cos, sin)]))

    def fits(self, x: Tensor) -> bool:
        """Whether the table is on x's device and precise enough for it."""
        return self.table.device == x.device and self.table.dtype == stat_dtype(x.dtype)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (..., D) at positions (int64, broadcasting to x's shape without D), in fp32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (part[positions].to(dtype) for part in self.table)
        return rotate(x.to(dtype), cos, sin).to(x.dtype)


def landmark_decode(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, blocks_k: Tensor, blocks_v: Tensor,
    open_k: Tensor, open_v: Tensor, *, rope: Tensor | None, open_len: int, top_k: int,
    always: int = 0, select: str = "token_and_head", scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """New tokens over the best blocks of a store and over the open block, which they join.

    Stored keys are rotated to their places 0 to L - 1 inside of their block.

    Args:
        q: (B, T, Hq, D), k: (B, T, Hkv, D), v: (B, T, Hkv, Dv), q and k not rotated; bf16 or fp16
            on a GPU, also fp32 and fp64 on a CPU.
        landmarks: (B, n, Hkv, D), the last keys of the blocks.
        blocks_k, blocks_v: (B, n, Hkv, L, D), contiguous but for the batch. For tensors on a GPU
            they may be in the CPU's pinned memory: chosen blocks are read where they are.
        open_k, open_v: (B, Hkv, L, D), written at places open_len to open_len + T - 1 <= L - 1.
        rope: (2, places, D) cos and sin, fp32 (fp64 for fp64), or None.
        open_len: Tokens in the open block.
        top_k: Blocks to choose, by their landmarks (>= 1); with fewer, all.
        always: Blocks at the end of the store that are read in any case and not chosen from.
        select: Whose choice it is: "token_and_head", "head" or "token", as in `RetrievalState`.
        scale: Factor on the scores, > 0 on a GPU; None is D**-0.5.

    Returns:
        out (B, T, Hq, Dv), lse (B, Hq, T), and the numbers of the chosen blocks, int32 (B, T, Hq,
        used), in order, with size 1 where tokens or heads share a choice.

    Raises:
        ValueError: Tensors or values that do not fit.
        NotImplementedError: A gradient is wanted.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.2.
    Equivalent to: lctx_kernels.reference.landmark_decode.

    >>> q, k, v, room = torch.randn(1, 1, 2, 8), *torch.randn(3, 1, 1, 2, 8)
    >>> blocks, room = torch.randn(1, 9, 2, 4, 8), torch.zeros(2, 1, 2, 4, 8)
    >>> out, lse, chosen = landmark_decode(
    ...     q, k, v, blocks[..., -1, :], blocks, blocks, *room, rope=None, open_len=0, top_k=3
    ... )
    >>> out.shape, chosen.shape
    (torch.Size([1, 1, 2, 8]), torch.Size([1, 1, 2, 3]))
    """
    _refuse_gradients("landmark_decode", q, k, v, open_k, open_v, blocks_k, blocks_v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse, chosen = torch.ops.lctx.landmark_decode(
        q, k, v, landmarks, blocks_k, blocks_v, open_k, open_v, rope, open_len, top_k, always,
        select, scale,
    )  # fmt: skip
    return out, lse, chosen


def infini_decode(
    q: Tensor, k: Tensor, v: Tensor, open_k: Tensor, open_k_mem: Tensor, open_v: Tensor, *,
    open_len: int, q_mem: Tensor, k_mem: Tensor, mem: tuple[Tensor, Tensor] | None = None,
    gate: Tensor | None = None, first: str = "gate", scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """New tokens over the open segment, which they join, gated with what the memory holds.

    Args:
        q, q_mem: (B, T, Hq, Dk), k, k_mem: (B, T, Hkv, Dk), v: (B, T, Hkv, Dv), as in
            `infini_attention`; bf16 or fp16 on a GPU, also fp32 and fp64 on a CPU.
        open_k, open_k_mem, open_v: (B, Hkv, N, D), written at places open_len to open_len + T - 1
            <= N - 1; segments of N tokens.
        open_len: Tokens in the open segment.
        mem: Memory of the closed segments, None before the first one is closed.
        gate: (Hq,) logits, fp32 (fp64 for fp64); None is zeros.
        first: Without memory: "gate" gives (1 - g) * local, "bypass" local.
        scale: Factor on the scores, > 0 on a GPU; None is Dk**-0.5.

    Returns:
        out (B, T, Hq, Dv) and lse (B, Hq, T) of the local softmax.

    Raises:
        ValueError: Tensors or values that do not fit.
        NotImplementedError: A gradient is wanted.

    Source: Munkhdalai et al. 2024 (arXiv 2404.07143), section 2.1, eq. 3 and 10.
    Equivalent to: lctx_kernels.reference.infini_attention on the whole open segment.

    >>> q, k, v = torch.randn(3, 1, 1, 2, 8)
    >>> room = torch.zeros(3, 1, 2, 16, 8)
    >>> out, lse = infini_decode(q, k, v, *room, open_len=0, q_mem=q, k_mem=k)
    >>> torch.allclose(out, 0.5 * v)
    True
    """
    M, z = (None, None) if mem is None else mem
    _refuse_gradients("infini_decode", q, k, v, q_mem, k_mem, M, z, gate, open_k, open_v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = torch.ops.lctx.infini_decode(
        q, k, v, q_mem, k_mem, open_k, open_k_mem, open_v, M, z, gate, open_len, first == "bypass",
        scale,
    )  # fmt: skip
    return out, lse


def _fake_landmark(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, blocks_k: Tensor, blocks_v: Tensor,
    open_k: Tensor, open_v: Tensor, rope: Tensor | None, open_len: int, top_k: int, always: int,
    select: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, T, H, _), used = q.shape, min(top_k, landmarks.shape[1] - always)
    tokens, heads = (1 if select == "head" else T), (1 if select == "token" else H)
    chosen = q.new_empty(B, tokens, heads, used, dtype=torch.int32)
    return *_fake_attention(q, v), chosen


def _fake_infini(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _fake_attention(q, v)


def _fake_attention(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    lse = q.new_empty(B, H, T, dtype=stat_dtype(q.dtype))
    return q.new_empty(B, T, H, v.shape[-1]), lse


if _load.LIBRARY_ERROR is None:
    torch.library.register_fake("lctx::landmark_decode", _fake_landmark)
    torch.library.register_fake("lctx::infini_decode", _fake_infini)


@cache
def _built(op: str, device_type: str) -> bool:
    if _load.LIBRARY_ERROR is not None:
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"lctx::{op}", key)


def can_decode(op: str, scale: float | None, *tensors: Tensor | None) -> bool:
    """Whether `op` takes these tensors, queries first; the torch path takes all others."""
    q, *others = (x for x in tensors if x is not None)
    if q.shape[1] == 0 or q.shape[1] > TOKENS or needs_grad(q, *others):
        return False
    if torch.compiler.is_compiling() or not _built(op, q.device.type):
        return False
    if any(x.dtype != q.dtype or x.device != q.device or x.stride(-1) != 1 for x in (q, *others)):
        return False
    if not q.is_cuda:
        return True
    D = q.shape[-1]
    same = all(x.shape[-1] == D for x in others)
    fits = same and D % 8 == 0 and D <= 256 and q.dtype in (torch.bfloat16, torch.float16)
    return fits and (scale is None or scale > 0) and all(map(_aligned, (q, *others)))


def fits_in_shared_memory(columns: int, keys: int, parts: int) -> bool:
    """Whether the scores of `keys` keys in `parts` blocks, and their queries, fit on a GPU."""
    own = -(-parts // 8)
    return own * (keys // parts) * 4 + (own + 10) * columns * 4 + own * 64 <= SHARED_BYTES


def _aligned(x: Tensor) -> bool:
    size = x.element_size()
    strides = (s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in strides)


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    if needs_grad(*tensors):
        raise NotImplementedError(
            f"{op} has no backward; expected torch.no_grad() or tensors without requires_grad; "
            "nearest is the attention of the whole text"
        )
