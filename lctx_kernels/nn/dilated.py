"""LongNet's attention layer under the name and arguments of its own repository."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._checks import require_options
from ..cache import DilatedState, Rows
from ..cache.rows import Span
from ..dilated import dilated_attention
from .attention import SelfAttention
from .relative import RelativeBias, dilated_attention_with_bias
from .rotary import Rotary


class DilatedAttention(SelfAttention):
    """Self-attention over the union of dilated branches.

    The output has the input's shape, whatever the dilation; dropout applies to the output. Tokens
    that no branch selects for a head get 0 from that head: one branch of rate 1 covers all.

    Args:
        d_model: Width of the layer's input and output.
        num_heads: Query heads.
        dilation_rate: Dilation r of every branch, or a number for one branch.
        segment_size: Segment length w of every branch (tokens), as many as rates.
        dropout: Probability of dropping an element of the output, in training.
        causal: A token sees itself and what is before it.
        use_xpos: Positions by xPos, at their true distances.
        use_rel_pos_bias: Add T5's relative-position bias to the scores, at true distances. No
            kernel takes a bias: this option runs plain PyTorch, with memory of
            (w / r) ** 2 scores per head and segment.
        qk_norm: Layer norms of queries and keys over the head dimension.
        casual: Another spelling of `causal`, from older releases of LongNet.
        rope_base: Base of a plain rotary embedding; None is none.
        xpos_base: Scale base of xPos (tokens); larger for longer texts.
        num_kv_heads: Key/value heads; None is num_heads.
        head_dim: Dimension of a head; None is d_model // num_heads.
        head_offset: "mod" or "block", as in `dilated_attention`.
        mix_grad: "exact" or "detached", as in `dilated_attention`.
        bias: Biases in the projections.

    Raises:
        TypeError: A rate or a size that is no int.
        ValueError: Different numbers of rates and sizes, or both xPos and a rotary embedding.

    Source: Ding et al. 2023 (arXiv 2307.02486), sections 2.2 and 2.3.
    Equivalent to: lctx_kernels.dilated_attention between projections.

    >>> import torch
    >>> layer = DilatedAttention(64, 4, [1, 2], [16, 64], causal=True, use_xpos=True)
    >>> layer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
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
        qk_norm: bool = False,
        *,
        casual: bool | None = None,
        rope_base: float | None = None,
        xpos_base: float = 512.0,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        head_offset: str = "mod",
        mix_grad: str = "exact",
        bias: bool = False,
    ) -> None:
        super().__init__(
            d_model, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope_base=rope_base,
            bias=bias, dropout=dropout,
        )  # fmt: skip
        self.dilation_rates = _branch_numbers("dilation_rate", dilation_rate)
        self.segment_lengths = _branch_numbers("segment_size", segment_size)
        if len(self.dilation_rates) != len(self.segment_lengths):
            raise ValueError(
                f"DilatedAttention: {len(self.dilation_rates)} entries of dilation_rate, "
                f"{len(self.segment_lengths)} of segment_size; expected one of each per branch"
            )
        if use_xpos and rope_base is not None:
            raise ValueError(
                f"DilatedAttention: use_xpos with rope_base = {rope_base}; expected one of the two"
            )
        require_options("DilatedAttention", head_offset=head_offset, mix_grad=mix_grad)
        self.causal = causal if casual is None else casual
        self.head_offset, self.mix_grad = head_offset, mix_grad
        if use_xpos:
            self.rotary = Rotary(self.head_dim, xpos_base=xpos_base)
        if qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        self.rel_pos_bias = RelativeBias(num_heads, self.causal) if use_rel_pos_bias else None

    def new_state(self) -> Rows[Any]:
        """An empty state for `forward(x, state=state)`.

        Raises:
            NotImplementedError: The layer is not causal, or has a relative-position bias.
        """
        if not self.causal or self.rel_pos_bias is not None:
            raise NotImplementedError(
                f"DilatedAttention: causal is {self.causal}, use_rel_pos_bias is "
                f"{self.rel_pos_bias is not None}; expected a causal layer without bias for token "
                "by token generation; nearest is a forward over the whole text for every token"
            )
        branches = (self.segment_lengths, self.dilation_rates)
        return Rows(partial(DilatedState, *branches, self.head_offset))

    def forward(
        self,
        x: Tensor,
        state: Rows[Any] | None = None,
        spans: Sequence[Span] | None = None,
        seqlens: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, d_model) to the same shape; with a state, x are the next tokens.

        seqlens: (B,) int32, true lengths of right-padded rows, whose pads get 0 before the last
            projection; only without a state.
        """
        q, k, v = self.project(x)
        if self.rotary is not None:
            positions = self.positions(x, state, spans)
            q, k = self.rotary(q, positions), self.rotary(k, positions, key=True)
        if state is not None or spans is not None:
            if seqlens is not None:
                raise ValueError(
                    "DilatedAttention: seqlens with a state or spans; expected one of them"
                )
            return self.output((state or self.new_state()).attend(q, k, v, spans=spans))
        options: dict[str, Any] = {
            "causal": self.causal, "head_offset": self.head_offset, "seqlens": seqlens,
        }  # fmt: skip
        branches = (self.segment_lengths, self.dilation_rates)
        if self.rel_pos_bias is None:
            out = dilated_attention(q, k, v, *branches, mix_grad=self.mix_grad, **options)
        else:
            if self.mix_grad != "exact":
                raise NotImplementedError(
                    f"DilatedAttention: mix_grad is {self.mix_grad!r} with use_rel_pos_bias; "
                    'expected "exact"'
                )
            out = dilated_attention_with_bias(q, k, v, *branches, self.rel_pos_bias, **options)
        return self.output(out)


def _branch_numbers(name: str, value: int | Sequence[int]) -> list[int]:
    numbers: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not numbers or any(not isinstance(n, int) or isinstance(n, bool) for n in numbers):
        raise TypeError(f"DilatedAttention: {name} is {value!r}; expected an int or a list of ints")
    if any(n < 1 for n in numbers):
        raise ValueError(f"DilatedAttention: {name} is {value!r}; expected numbers >= 1")
    return numbers
