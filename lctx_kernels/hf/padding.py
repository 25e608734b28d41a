"""Rows with pads in transformers' attention functions: which columns are tokens, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def tokens_of(attention_mask: Tensor | None, kv_offset: int, kv_length: int) -> Tensor | None:
    """The (B, kv_length) mask of tokens, None if no row has pads."""
    if attention_mask is None:
        return None
    tokens = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if tokens.shape[1] < kv_length:
        tokens = torch.nn.functional.pad(tokens, (0, kv_length - tokens.shape[1]), value=False)
    return None if bool(tokens.all()) else tokens


def by_rows(name: str, attend: Attend, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """`attend` for each row alone, without its pads, whose output is 0.

    Raises:
        ValueError: Pads between the tokens of a row.
    """
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    before = k.shape[1] - q.shape[1]
    for row, (start, end) in enumerate(_spans(name, tokens)):
        first = max(start, before)
        if first >= end:
            continue
        part = attend(
            q[row : row + 1, first - before : end - before],
            k[row : row + 1, start:end], v[row : row + 1, start:end],
        )  # fmt: skip
        out[row : row + 1, first - before : end - before] = part.to(out.dtype)
    return out


def _spans(name: str, tokens: Tensor) -> Sequence[tuple[int, int]]:
    start, count = tokens.int().argmax(1), tokens.sum(1)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    solid = (columns >= start[:, None]) & (columns < (start + count)[:, None])
    if not torch.equal(solid, tokens):
        raise ValueError(
            f"{name}: attention_mask has pads between the tokens of a row; expected pads before or "
            "after them"
        )
    return list(zip(start.tolist(), (start + count).tolist(), strict=True))
