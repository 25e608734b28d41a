"""Perplexity and bits per byte of a text, read in chunks of which every token counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class PerplexityResult:
    """Mean loss of the tokens of texts of one length.

    tokens: How many were predicted. loss: Mean cross entropy, nats. bits_per_byte: None if the
    size of the text is not known.
    """

    length: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: Any,
    ids: Tensor,
    length: int,
    *,
    chunk: int | None = None,
    n_bytes: int | None = None,
    make_cache: Callable[[], Any] | None = None,
    on_text: Callable[[float], None] | None = None,
) -> PerplexityResult:
    """Mean loss over a text that is cut into pieces of `length`, each read with its own context.

    Args:
        model: A causal language model of transformers.
        ids: (T,) tokens of the text; what is left after the last whole piece is not used.
        length: Tokens of a piece, the context that the last of them has (>= 2).
        chunk: Tokens that are fed at a time, with a cache between them; None is the whole piece.
        n_bytes: Size of the text in bytes, for bits per byte: its share for the predicted tokens.
        make_cache: Makes an empty cache, if chunk is given; None is transformers' own.
        on_text: Called with the loss of every piece, for a progress bar.

    Raises:
        ValueError: A text shorter than one piece, or numbers that do not fit.

    Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 4.1 (pieces fed in chunks).
    """
    if length < 2 or (chunk is not None and chunk < 1):
        raise ValueError(
            f"perplexity: length is {length}, chunk is {chunk}; expected at least 2 and 1"
        )
    pieces = ids.shape[0] // length
    if pieces == 0:
        raise ValueError(
            f"perplexity: the text has {ids.shape[0]} tokens; expected at least length = {length}"
        )
    total = 0.0
    for piece in ids[: pieces * length].view(pieces, length):
        loss = _piece(model, piece.to(model.device)[None], chunk, make_cache)
        total += loss
        if on_text is not None:
            on_text(loss / (length - 1))
    tokens = pieces * (length - 1)
    mean = total / tokens
    bits = None
    if n_bytes is not None:
        bits = mean / math.log(2) * ids.shape[0] / n_bytes
    return PerplexityResult(length, tokens, mean, math.exp(min(mean, 700.0)), bits)


def _piece(
    model: Any, ids: Tensor, chunk: int | None, make_cache: Callable[[], Any] | None
) -> float:
    """Sum of the losses of all tokens of ids (1, T) but the first."""
    if chunk is None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return _sum(logits, ids[:, 1:])
    cache = make_cache() if make_cache is not None else None
    total, before = 0.0, None
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        out = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits if before is None else torch.cat([before, out.logits], dim=1)
        targets = part[:, 1:] if before is None else part
        total += _sum(logits[:, :-1], targets)
        before = out.logits[:, -1:]
    return total


def _sum(logits: Tensor, targets: Tensor) -> float:
    flat = logits.flatten(0, 1).float()
    return functional.cross_entropy(flat, targets.flatten(), reduction="sum").item()
