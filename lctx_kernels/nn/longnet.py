"""LongNet's models under the names and arguments of its own repository."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .dilated import DilatedAttention
from .sampling import evaluating, sample


class LongNetTransformer(nn.Module):
    """Embedding, `depth` blocks of dilated attention and feed-forward, and a head.

    Args:
        dim: Width.
        depth: Blocks.
        num_tokens: Size of the vocabulary.
        dim_head: Dimension of a head.
        heads: Heads.
        ff_mult: Width of the feed-forward layers over `dim`.
        dilation_rate, segment_size: Branches, as in `DilatedAttention`.
        causal: A token sees itself and what is before it.
        dropout: Of the outputs of the branches, in training.
        rope_base: Base of the rotary embedding; None is no position embedding.

    Source: Ding et al. 2023 (arXiv 2307.02486).

    >>> model = LongNetTransformer(32, 2, 97, dim_head=8, heads=4, dilation_rate=[1, 2],
    ...                            segment_size=[8, 32])
    >>> model(torch.randint(97, (2, 20))).shape
    torch.Size([2, 20, 97])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_tokens: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        dilation_rate: int | Sequence[int] = 2,
        segment_size: int | Sequence[int] = 64,
        *,
        causal: bool = True,
        dropout: float = 0.0,
        rope_base: float | None = 10000.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            Block(
                DilatedAttention(
                    dim, heads, dilation_rate, segment_size, dropout, causal, head_dim=dim_head,
                    rope_base=rope_base,
                ),
                dim, ff_mult, dropout,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, num_tokens, bias=False))

    def new_states(self) -> list[Any]:
        """An empty state per block for `forward(ids, states)`."""
        blocks = [block for block in self.layers if isinstance(block, Block)]
        return [block.attention.new_state() for block in blocks]

    def forward(self, ids: Tensor, states: list[Any] | None = None) -> Tensor:
        """ids (B, T) int64 to logits (B, T, num_tokens); with states, ids are the next tokens."""
        x = self.embedding(ids)
        for block, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x = block(x, state)
        logits: Tensor = self.head(x)
        return logits


class Block(nn.Module):
    """Dilated attention and a feed-forward layer, each after a norm and added to what came in."""

    def __init__(self, attention: DilatedAttention, dim: int, ff_mult: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(dim), attention
        self.feedforward = nn.Sequential(
            nn.RMSNorm(dim), nn.Linear(dim, dim * ff_mult), nn.GELU(),
            nn.Linear(dim * ff_mult, dim), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        """x (B, T, dim) to the same shape; with a state, x are the next tokens."""
        x = x + self.attention(self.norm(x), state)
        y: Tensor = x + self.feedforward(x)
        return y


class AutoregressiveWrapper(nn.Module):
    """Loss and generation for a model from tokens to logits.

    Args:
        net: Such a model, causal.
        max_seq_len: Tokens that a prompt is cut to, from the left.
        pad_value: Label that does not count, in texts that are padded with it.

    >>> net = LongNetTransformer(32, 2, 97, dim_head=8, heads=4)
    >>> wrapper = AutoregressiveWrapper(net)
    >>> wrapper.generate(torch.randint(97, (1, 6)), 5, temperature=0.0).shape
    torch.Size([1, 5])
    """

    def __init__(
        self, net: LongNetTransformer, max_seq_len: int = 2048, pad_value: int = 0
    ) -> None:
        super().__init__()
        self.net, self.max_seq_len, self.pad_value = net, max_seq_len, pad_value

    def forward(self, ids: Tensor) -> Tensor:
        """Mean cross entropy of ids (B, T), each token but pads predicted from those before it."""
        logits, targets = self.net(ids[:, :-1]), ids[:, 1:]
        return functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=self.pad_value
        )

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
    ) -> Tensor:
        """(B, seq_len) new tokens after start_tokens (B, T) or (T,), without the prompt.

        eos_token: Ends a row, which is then filled with pads. filter_thres: the likeliest
        ceil((1 - filter_thres) * vocabulary) tokens are sampled from.

        Raises:
            ValueError: An empty prompt, no token to make, or limits that leave none.
        """
        prompt = start_tokens if start_tokens.dim() == 2 else start_tokens[None]
        if prompt.shape[1] == 0 or seq_len < 1:
            raise ValueError(
                f"AutoregressiveWrapper.generate: start_tokens has shape "
                f"{tuple(start_tokens.shape)}, seq_len is {seq_len}; expected at least one token "
                "of both"
            )
        states, new = self.net.new_states(), []
        ended = torch.zeros_like(prompt[:, 0], dtype=torch.bool)
        with evaluating(self.net):
            logits = self.net(prompt[:, -self.max_seq_len :], states)[:, -1]
            top_k = math.ceil((1 - filter_thres) * logits.shape[-1])
            for step in range(seq_len):
                token = sample(logits, temperature, top_k)
                token = token.masked_fill(ended, self.pad_value)
                new.append(token)
                if eos_token is not None:
                    ended |= token == eos_token
                if bool(ended.all()) or step == seq_len - 1:
                    break
                logits = self.net(token[:, None], states)[:, -1]
        out = torch.stack(new, dim=1)
        return out if start_tokens.dim() == 2 else out[0]
