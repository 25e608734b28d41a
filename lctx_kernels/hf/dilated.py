"""Dilated attention in transformers' registries: an attention function and a mask function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache.dilated import dilated_attention_last
from ..dilated import dilated_attention
from ..flash import flash_attention
from ._compat import AttentionInterface, AttentionMaskInterface
from .options import refuse_in_scores

NAME = "lctx_dilated"


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
    """Dilated attention of a layer that `config.lctx` names, dense causal attention of any other.

    query (B, Hq, Tq, D), key, value (B, Hkv, Tk, D); attention_mask (B, Tk) bool or None. Returns
    (B, Tq, Hq, D) and None.

    Raises:
        NotImplementedError: A 4-D mask, dropout, soft-capped scores, a window on a dilated layer.
    """
    spec = module.config.lctx
    dilated = module.layer_idx in spec["layers"]
    window = kwargs.get("sliding_window")
    _refuse(module, attention_mask, dropout, window if dilated else None, kwargs.get("softcap"))
    options = spec["options"]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not dilated:
            return flash_attention(q, k, v, scale=scaling, window=window)
        branches, offset = (options["segment_lengths"], options["dilation_rates"]), options
        if q.shape[1] == k.shape[1]:
            return dilated_attention(
                q, k, v, *branches, scale=scaling, head_offset=offset["head_offset"],
                mix_grad=options["mix_grad"],
            )  # fmt: skip
        return dilated_attention_last(
            q, k, v, *branches, scale=scaling, head_offset=offset["head_offset"]
        )

    out = attend(q, k, v) if attention_mask is None else _by_rows(attend, q, k, v, attention_mask)
    return out, None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """None if no row has pads, else the (B, kv_length) mask of tokens.

    Raises:
        NotImplementedError: Another visibility than causal, such as that of packed texts.
    """
    if not allow_is_causal_skip and not torch.compiler.is_compiling():  # there, the backbone checks
        raise NotImplementedError(
            f"{NAME}: packed texts (position_ids that restart) or a mask function of your own; "
            "expected one causal text per row"
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if padding.shape[1] < kv_length:
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]), value=False)
    return None if bool(padding.all()) else padding


def register() -> None:
    """Make `attn_implementation="lctx_dilated"` known, with its mask function: both, always."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def _refuse(
    module: Any, attention_mask: Tensor | None, dropout: float, window: Any, softcap: Any
) -> None:
    where = type(module).__name__
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            f"{where}: attention_mask has {attention_mask.dim()} dimensions; expected 2, (B, T): "
            "dilated attention has a visibility of its own"
        )
    refuse_in_scores(where, dropout, softcap)
    if window is not None:
        raise NotImplementedError(
            f"{where}: sliding_window is {window} in a dilated layer; expected None"
        )


def _by_rows(attend: Any, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """Each row alone, without its pads, whose output is 0."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    before = k.shape[1] - q.shape[1]
    for row, (start, end) in enumerate(_spans(tokens)):
        first = max(start, before)
        if first >= end:
            continue
        part = attend(
            q[row : row + 1, first - before : end - before],
            k[row : row + 1, start:end], v[row : row + 1, start:end],
        )  # fmt: skip
        out[row : row + 1, first - before : end - before] = part.to(out.dtype)
    return out


def _spans(tokens: Tensor) -> Sequence[tuple[int, int]]:
    start, count = tokens.int().argmax(1), tokens.sum(1)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    solid = (columns >= start[:, None]) & (columns < (start + count)[:, None])
    if not torch.equal(solid, tokens):
        raise ValueError(
            f"{NAME}: attention_mask has pads between the tokens of a row; expected pads before or "
            "after them"
        )
    return list(zip(start.tolist(), (start + count).tolist(), strict=True))
