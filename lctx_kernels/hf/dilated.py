"""Dilated attention in transformers' registries: an attention function and a mask function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cache.dilated import dilated_attention_last
from ..dilated import dilated_attention
from ..flash import flash_attention
from ._compat import AttentionInterface, AttentionMaskInterface
from .options import refuse_in_scores
from .padding import by_rows, tokens_of

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
        branches = (options["segment_lengths"], options["dilation_rates"])
        if q.shape[1] == k.shape[1]:
            return dilated_attention(
                q, k, v, *branches, scale=scaling, head_offset=options["head_offset"],
                mix_grad=options["mix_grad"],
            )  # fmt: skip
        return dilated_attention_last(
            q, k, v, *branches, scale=scaling, head_offset=options["head_offset"]
        )

    if attention_mask is None:
        return attend(q, k, v), None
    return by_rows(NAME, attend, q, k, v, attention_mask), None


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
    return tokens_of(attention_mask, kv_offset, kv_length)


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
