"""Attention layers as `torch.nn` modules. Not built yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["DilatedAttention"]


class DilatedAttention(torch.nn.Module):
    """LongNet's attention layer under the name and arguments of its own repository. Not built yet.

    Raises:
        NotImplementedError: Always, today; the op it will use is `dilated_attention`.

    >>> from lctx_kernels import nn
    >>> nn.DilatedAttention(512, 8, 2, 64)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    NotImplementedError: nn.DilatedAttention is not built yet; ...
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dilation_rate: int | Sequence[int],
        segment_size: int | Sequence[int],
        dropout: float = 0.0,
        causal: bool = False,
        use_xpos: bool = False,
        use_rel_pos_bias: bool = False,
    ) -> None:
        raise NotImplementedError(
            "nn.DilatedAttention is not built yet; nearest is lctx_kernels.dilated_attention on "
            "the q, k, v of your own projections"
        )
