"""Exact attention in transformers' registries: an attention function and a mask function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..flash import flash_attention
from ._compat import AttentionInterface, AttentionMaskInterface
from .options import refuse_in_scores
from .padding import by_rows, tokens_of

NAME = "lctx_dense"  # "flash" in a name means other libraries to transformers

HARMLESS = frozenset(["position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k"])
"""Tensors that layers hand to every attention function and that change no score here."""


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact causal attention, inside the layer's sliding window if it has one.

    query (B, Hq, Tq, D), key, value (B, Hkv, Tk, D); attention_mask: None, (B, Tk) bool, or the
    starts of documents in the B * Tk tokens of all rows, and their number, as `mask` makes them.
    Returns (B, Tq, Hq, D) and None.

    Raises:
        NotImplementedError: A 4-D mask, dropout, soft-capped scores, a layer that is not causal, or
            does not say over how many tokens it slides, or has more to say of its scores.
    """
    where = type(module).__name__
    if attention_mask is not None and attention_mask.dim() > 2:
        raise NotImplementedError(
            f"{where}: attention_mask has {attention_mask.dim()} dimensions; expected 2, (B, T)"
        )
    _refuse_other_scores(module, where, kwargs)
    refuse_in_scores(where, dropout, kwargs.get("softcap"))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = kwargs.get("sliding_window")

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None) -> Tensor:
        return flash_attention(q, k, v, scale=scaling, window=window, cu_seqlens=starts)

    if attention_mask is None:
        return attend(q, k, v), None
    if attention_mask.dim() == 2:
        return by_rows(NAME, attend, q, k, v, attention_mask), None
    one = [x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v)]
    out = attend(one[0], one[1], one[2], attention_mask)
    return out.view(*q.shape[:3], v.shape[-1]), None


def _refuse_other_scores(module: Any, where: str, kwargs: dict[str, Any]) -> None:
    """What a layer's scores or visibility depend on beyond queries, keys and a window."""
    if not getattr(module, "is_causal", True):
        raise NotImplementedError(f"{where}: is_causal is False; expected a causal layer")
    config = getattr(module, "config", None)
    chunk = getattr(config, "attention_chunk_size", None)
    unsaid = "sliding_window" not in kwargs and getattr(config, "sliding_window", None) is not None
    if chunk is not None or unsaid:
        raise NotImplementedError(
            f"{where}: config has attention_chunk_size or a sliding_window that the layer does not "
            "hand on; expected layers that see everything, or hand on `sliding_window`"
        )
    given = sorted(n for n, x in kwargs.items() if isinstance(x, Tensor) and n not in HARMLESS)
    if given:
        raise NotImplementedError(
            f"{where}: {', '.join(given)} given to the attention function, which no kernel takes; "
            "expected layers whose scores are those of queries and keys alone"
        )


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """None for a causal text per row, the (B, kv_length) tokens of padded rows, or documents.

    Raises:
        NotImplementedError: Another visibility, or a cache longer than what it holds.
    """
    if not allow_is_causal_skip:
        if q_length != kv_length:
            raise NotImplementedError(
                f"{NAME}: a static cache of {kv_length} tokens, packed texts with a cache, or a "
                "mask function of your own; expected a cache that grows"
            )
        if attention_mask is not None:
            raise NotImplementedError(
                f"{NAME}: packed texts, or a mask function of your own, with an attention_mask; "
                "expected position_ids alone, from the first token on"
            )
        starts: Tensor | None = _documents(batch_size, q_length, mask_function, local_size, device)
        return starts
    if attention_mask is None and kv_length > int(q_offset) - kv_offset + q_length:
        raise NotImplementedError(
            f"{NAME}: a static cache of {kv_length} tokens that holds {int(q_offset) + q_length}; "
            "expected a cache that grows"
        )
    return tokens_of(attention_mask, kv_offset, kv_length)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _documents(B: int, T: int, visible: Any, window: int | None, device: Any) -> Tensor | None:
    """(documents + 1,) int32, starts of the documents in all rows; None if each row is one.

    transformers gives visibility as a function of (batch, head, query, key): a document starts
    where a token does not see the one before it. The other probes refuse what is no packing.
    """
    row, token = torch.arange(B, device=device)[:, None], torch.arange(T, device=device)[None]
    head = torch.zeros_like(row)
    starts = ~visible(row, head, token, (token - 1).clamp(min=0)).expand(B, T) | (token == 0)
    first = torch.where(starts, token, 0).cummax(1).values
    sees_start = visible(row, head, token, first) | torch.tensor(window is not None, device=device)
    sees_before = visible(row, head, token, (first - 1).clamp(min=0)) & (first > 0)
    sees_next = visible(row, head, token, (token + 1).clamp(max=T - 1)) & (token < T - 1)
    if not bool((sees_start & ~sees_before & ~sees_next).all()):
        raise NotImplementedError(
            f"{NAME}: a mask function of your own; expected causal texts, one per row or packed"
        )
    if int(starts.sum()) == B:
        return None
    bounds = starts.flatten().nonzero().flatten()
    return torch.nn.functional.pad(bounds, (0, 1), value=B * T).to(torch.int32)


def register() -> None:
    """Make `attn_implementation="lctx_dense"` known, with its mask function: both, always."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
