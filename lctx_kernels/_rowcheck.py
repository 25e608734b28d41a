"""Sampled rows of each attention from its definition in fp64, where the dense one would not fit.

Row i of a causal attention is the last row of the attention over the first i + 1 tokens. So a row
costs O(i), and its gradient with respect to q_i comes with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import reference as _reference

reference: Any = _reference  # the definitions carry no types
Rows = Callable[..., torch.Tensor]


def definition_rows(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Sequence[int],
    heads: Sequence[int] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Rows `rows` of the attention `op` ("flash", "landmark", "dilated", "infini") in fp64.

    q: (B, Tq, Hq, Dk), k: (B, Tk, Hkv, Dk), v: (B, Tk, Hkv, Dv); causal, or "flash" with
    causal=False. heads: query heads, None is all. Returns (B, len(rows), len(heads), Dv) fp64,
    differentiable.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 10, 2, 8, dtype=torch.float64).unbind()
    >>> full, _ = reference.landmark_attention(q, k, v, block_size=4)
    >>> torch.allclose(definition_rows("landmark", q, k, v, [3, 9], block_size=4), full[:, [3, 9]])
    True
    """
    Hq = q.shape[2]
    if op == "dilated":
        options["heads"] = (range(Hq) if heads is None else heads, Hq)
    if heads is not None:
        readers = [h // (Hq // k.shape[2]) for h in heads]  # one key/value head for each
        q, k, v = q[:, :, list(heads)], k[:, :, readers], v[:, :, readers]
    return _ROWS[op](q.double(), k.double(), v.double(), list(rows), **options)


def definition_gradients(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """(out, dq, dk, dv) of the dense definition in fp64, for lengths where a (T, T) matrix fits."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = getattr(reference, f"{op}_attention")(q, k, v, **options)[0]
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double()))


def sample_rows(length: int, count: int = 12, seed: int = 0) -> list[int]:
    """The last two rows and a few seeded ones of the last seven eighths, sorted, without repeats.

    Early rows average few values, are larger, and would hide an error of the others in an RMS.
    """
    if length <= 0:
        return []
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(length // 8, length, (max(count - 2, 0),), generator=generator).tolist()
    return sorted({max(length - 2, 0), length - 1, *inner})


def _prefix_rows(definition: Callable[..., Any]) -> Rows:
    def rows_of(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: list[int], **options: Any
    ) -> torch.Tensor:
        if options.get("causal") is False:
            out: torch.Tensor = definition(q[:, rows], k, v, **options)[0]
            return out
        seen = k.shape[1] - q.shape[1] + 1  # by row 0
        parts = [
            definition(q[:, i : i + 1], k[:, : i + seen], v[:, : i + seen], **options)[0]
            for i in rows
        ]
        return torch.cat(parts, dim=1)

    return rows_of


def _infini_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: list[int], **options: Any
) -> torch.Tensor:
    end = max(rows) + 1
    out: torch.Tensor
    out, _ = reference.infini_attention(q[:, :end], k[:, :end], v[:, :end], **options)
    return out[:, rows]


def _dilated_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: list[int],
    heads: tuple[Sequence[int], int],
    **options: Any,
) -> torch.Tensor:
    numbers, Hq = heads  # the heads given in q, among Hq
    group = q.shape[2] // k.shape[2]
    outs = []
    for n, h in enumerate(numbers):
        one = q[:, :, n : n + 1], k[:, :, n // group, None], v[:, :, n // group, None]
        outs.append(torch.cat([_dilated_row(*one, i, h, Hq, **options) for i in rows], dim=1))
    return torch.cat(outs, dim=2)


def _dilated_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: int,
    h: int,
    Hq: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offset: str = "mod",
    scale: float | None = None,
) -> torch.Tensor:
    """Row i of query head h of Hq: attention over each branch's selected keys, merged."""
    q = q[:, i : i + 1]
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full((q.shape[0], 1, 1), -torch.inf)
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        offset = h % r if head_offset == "mod" else h // -(-Hq // r)
        if i % w % r == offset:
            seen = slice(i - i % w + offset, i + 1, r)
            branch = reference.flash_attention(q, k[:, seen], v[:, seen], scale=scale)
            out, lse = reference.merge_attention(out, lse, *branch)
    return out


_ROWS: dict[str, Rows] = {
    "flash": _prefix_rows(reference.flash_attention),
    "landmark": _prefix_rows(reference.landmark_attention),
    "dilated": _dilated_rows,
    "infini": _infini_rows,
}
