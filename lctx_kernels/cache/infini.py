"""Infini-attention token by token: a memory of closed segments and the keys of the open one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._dtypes import stat_dtype, without_autocast
from .._ops import needs_grad
from ..flash import flash_attention
from ..infini import InfiniMemory, infini_attention
from .decode import can_decode, infini_decode


class InfiniState:
    """What one layer keeps of everything read: constant in size, however much that is.

    Memory: Hkv (Dk Dv + Dk) fp32 numbers per row for the closed segments, and segment_len keys
    (with and without position embedding) and values of the open one.

    Args:
        segment_len: Length of a segment (tokens, >= 1).
        update: "linear" or "delta", as in `infini_attention`.
        first: "gate" or "bypass", as in `infini_attention`.
        mem: Memory of what came before; None is the empty memory.
        detach_every: As in `infini_attention`, for segments that `attend` closes with `softcap`.
        softcap: Scores s become softcap * tanh(s / softcap), as in Gemma 2. No kernel does that:
            local attention then runs in plain PyTorch, with segment_len ** 2 scores per head.

    Up to 16 tokens without gradient are decoded by one op (`cache.decode.infini_decode`).

    Source: Munkhdalai et al. 2024 (arXiv 2404.07143), section 2.1.
    Equivalent to: one call of lctx_kernels.infini_attention on all tokens.

    >>> from lctx_kernels import infini_attention
    >>> q, k, v = torch.randn(3, 1, 11, 2, 8)
    >>> state = InfiniState(segment_len=4)
    >>> parts = [state.attend(*(x[:, i : i + 3] for x in (q, k, v))) for i in range(0, 11, 3)]
    >>> out, _ = infini_attention(q, k, v, segment_len=4)
    >>> torch.allclose(torch.cat(parts, dim=1), out, atol=1e-5)
    True
    """

    def __init__(
        self,
        segment_len: int = 2048,
        update: str = "linear",
        first: str = "gate",
        mem: InfiniMemory | None = None,
        detach_every: int = 0,
        softcap: float | None = None,
    ) -> None:
        self.segment_len, self.update, self.first = segment_len, update, first
        self.mem, self.detach_every, self.softcap = mem, detach_every, softcap
        self.closed = 0  # segments
        self.open: list[Tensor] = []  # k, k_mem, v, each (B, Hkv, segment_len, D)
        self.length = 0  # tokens in the open segment
        self.seen = 0

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_mem: Tensor | None = None,
        k_mem: Tensor | None = None,
        gate: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Output (B, T, Hq, Dv) of the next T tokens; arguments as in `infini_attention`."""
        q_mem, k_mem = (q if q_mem is None else q_mem), (k if k_mem is None else k_mem)
        T, N, start = q.shape[1], self.segment_len, 0
        outs = []
        while start < T:
            whole = (T - start) // N * N if self.length == 0 and self.softcap is None else 0
            end = start + (whole or min(N - self.length, T - start))
            piece, k_piece, v_piece, q_mem_piece, k_mem_piece = (
                x[:, start:end] for x in (q, k, v, q_mem, k_mem)
            )
            if whole:
                out, self.mem = infini_attention(
                    piece, k_piece, v_piece, self.mem, q_mem=q_mem_piece, k_mem=k_mem_piece,
                    gate=gate, segment_len=N, update=self.update, first=self.first, scale=scale,
                )  # fmt: skip
            else:
                out = self._in_open_segment(
                    piece, k_piece, v_piece, q_mem_piece, k_mem_piece, gate, scale
                )
            outs.append(out)
            start = end
        self.seen += T
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def select(self, rows: Tensor) -> InfiniState:
        """The rows `rows` (n,) int64 of the batch, in that order."""
        chosen = InfiniState(
            self.segment_len, self.update, self.first, None, self.detach_every, self.softcap
        )
        chosen.closed = self.closed
        if self.mem is not None:
            rows = rows.to(self.mem.M.device)
            chosen.mem = InfiniMemory(*(x.index_select(0, rows) for x in self.mem))
        chosen.open = [x.index_select(0, rows.to(x.device)) for x in self.open]
        chosen.length, chosen.seen = self.length, self.seen
        return chosen

    def _in_open_segment(
        self, q: Tensor, k: Tensor, v: Tensor, q_mem: Tensor, k_mem: Tensor, gate: Tensor | None,
        scale: float | None,
    ) -> Tensor:  # fmt: skip
        if not self.open:
            B, _, H, _ = k.shape
            self.open = [x.new_empty(B, H, self.segment_len, x.shape[3]) for x in (k, k_mem, v)]
        start, self.length = self.length, self.length + q.shape[1]
        if (
            self.softcap is None
            and can_decode("infini_decode", scale, q, k, v, q_mem, k_mem, *self.open)
            and not needs_grad(gate, *(self.mem or ()))
        ):
            out, _ = infini_decode(
                q, k, v, *self.open, open_len=start, q_mem=q_mem, k_mem=k_mem, mem=self.mem,
                gate=gate, first=self.first, scale=scale,
            )  # fmt: skip
        else:
            out = self._in_torch(start, q, k, v, q_mem, k_mem, gate, scale)
        if self.length == self.segment_len:
            with without_autocast(q.device.type):
                self.close()
        return out

    def _in_torch(
        self, start: int, q: Tensor, k: Tensor, v: Tensor, q_mem: Tensor, k_mem: Tensor,
        gate: Tensor | None, scale: float | None,
    ) -> Tensor:  # fmt: skip
        for room, x in zip(self.open, (k, k_mem, v), strict=True):
            room[:, :, start : self.length] = x.transpose(1, 2)
        keys, _, values = self._tokens()
        if self.softcap is None:
            local = flash_attention(q, keys, values, scale=scale)
        else:
            local = _capped_attention(q, keys, values, scale, self.softcap)
        with without_autocast(q.device.type):
            return self._with_memory(local, q_mem, gate)

    def _tokens(self) -> list[Tensor]:
        """k, k_mem, v of the open segment, (B, length, Hkv, D) each."""
        return [x[:, :, : self.length].transpose(1, 2) for x in self.open]

    def _with_memory(self, local: Tensor, q_mem: Tensor, gate: Tensor | None) -> Tensor:
        if self.mem is None and self.first == "bypass":
            return local
        stat = stat_dtype(local.dtype)
        logits = local.new_zeros(local.shape[2], dtype=stat) if gate is None else gate
        g = torch.sigmoid(logits)[:, None]
        if self.mem is None:
            return ((1 - g) * local).to(local.dtype)
        retrieved = _retrieve(_phi(q_mem, stat), self.mem)
        return (g * retrieved + (1 - g) * local).to(local.dtype)

    def close(self) -> None:
        """Fold the open segment into the memory, however short it is."""
        if self.length == 0:
            return
        _, k_mem, v = self._tokens()
        stat = stat_dtype(v.dtype)
        phi, written = _phi(k_mem, stat), v.to(stat)
        if self.update == "delta" and self.mem is not None:
            written = written - _retrieve(phi, self.mem)
        M, z = torch.einsum("bnhd,bnhe->bhde", phi, written), phi.sum(1)
        if self.mem is not None:
            M, z = self.mem.M + M, self.mem.z + z
        self.mem, self.length, self.closed = InfiniMemory(M, z), 0, self.closed + 1
        if self.detach_every and self.closed % self.detach_every == 0:
            self.mem = InfiniMemory(M.detach(), z.detach())
        if any(x.requires_grad for x in self.open):
            self.open = []  # a backward will still read them


def _capped_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float
) -> Tensor:
    """Causal attention of the last Tq of Tk tokens with soft-capped scores, in plain PyTorch."""
    (B, Tq, Hq, D), (Tk, Hkv), dtype = q.shape, k.shape[1:3], q.dtype
    stat = stat_dtype(dtype)
    with without_autocast(q.device.type):
        grouped = q.to(stat).view(B, Tq, Hkv, Hq // Hkv, D)
        scores = torch.einsum("bihgd,bjhd->bhgij", grouped, k.to(stat))
        scores = scores * (D**-0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap)
        late = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(Tk - Tq + 1)
        weights = scores.masked_fill(late, -torch.inf).softmax(-1)
        out = torch.einsum("bhgij,bjhd->bihgd", weights, v.to(stat))
    return out.reshape(B, Tq, Hq, -1).to(dtype)


def _phi(x: Tensor, stat: torch.dtype) -> Tensor:
    return functional.elu(x.to(stat)) + 1


def _retrieve(phi: Tensor, mem: InfiniMemory) -> Tensor:
    """(B, T, H, Dk) features to the (B, T, H, Dv) that the memory holds for them."""
    B, T, H, Dk = phi.shape
    grouped = phi.view(B, T, mem.z.shape[1], -1, Dk)
    norm = torch.einsum("bthgd,bhd->bthg", grouped, mem.z).clamp(min=1e-6)
    out = torch.einsum("bthgd,bhde->bthge", grouped, mem.M) / norm.unsqueeze(-1)
    return out.reshape(B, T, H, -1)
