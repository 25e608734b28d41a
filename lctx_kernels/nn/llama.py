"""A Llama-style language model whose layers attend in any of the ways of this package."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import _remat
from ..blockwise import blockwise_cross_entropy, blockwise_feedforward
from ..cp.agree import begin
from ..cp.groups import Ranks, process_group
from ..cp.plan import Plan, make_plan
from ..cp.shard import rows_at, shard, shift_labels
from ..data.landmarks import gather, insertion, spread
from .attention import FullAttention, InfiniAttention, LandmarkAttention, SelfAttention
from .dilated import DilatedAttention
from .ring import RingAttention
from .sampling import evaluating, sample

KEEP = "everything_saveable"  # with states, which a second run would write to again
METHODS = ("full", "infini", "landmark", "dilated", "ring")


@dataclass
class LlamaConfig:
    """Shape of a `Llama`.

    Args:
        vocab_size: Tokens; a landmark model holds one embedding more.
        d_model, num_layers, num_heads: Width, depth, query heads.
        num_kv_heads: Key/value heads; None is num_heads.
        d_ff: Width of the feed-forward layers; None is 8/3 d_model, rounded up to 64.
        attention: Method of every layer, or one for all: full, infini, landmark, dilated; or ring
            for all.
        options: Options of the methods, such as {"infini": {"segment_len": 512}}; for dilated
            the branches as segment_lengths and dilation_rates.
        rope_base: Base of the rotary embedding.
        dropout: Of the outputs of attention and feed-forward layers, in training.
        tie: Whether the output layer is the embedding.
        ffn_chunk: Tokens of which feed-forward activations exist at a time; 0 is all.
        ffn_remat: What the backward keeps of feed-forward layers, as of `blockwise_feedforward`;
            None is True with ffn_chunk, else False.
        remat: What the backward keeps of whole layers, likewise. "attention_saveable" computes
            again all but attention.
        loss_chunk: Tokens of which logits exist at a time in the loss.
        norm_eps: Added to the mean square in norms; None is the smallest step of the dtype.
    """

    vocab_size: int
    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    d_ff: int | None = None
    attention: str | Sequence[str] = "full"
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    rope_base: float = 10000.0
    dropout: float = 0.0
    tie: bool = True
    ffn_chunk: int = 0
    ffn_remat: bool | str | None = None
    remat: bool | str = False
    loss_chunk: int = 1024
    norm_eps: float | None = None

    def methods(self) -> list[str]:
        """The method of every layer.

        Raises:
            ValueError: An unknown method, or not one per layer.
        """
        one = isinstance(self.attention, str)
        methods = [self.attention] * self.num_layers if one else list(self.attention)
        unknown = [m for m in [*methods, *self.options] if m not in METHODS]
        if unknown or len(methods) != self.num_layers:
            raise ValueError(
                f"LlamaConfig: attention is {self.attention!r} with options for "
                f"{', '.join(self.options) or 'none'} and {self.num_layers} layers; expected one "
                f"of {', '.join(METHODS)}, or one of them per layer"
            )
        if "ring" in methods and set(methods) != {"ring"}:
            raise ValueError(
                f"LlamaConfig: attention is {self.attention!r}; expected ring in all layers or in "
                "none: the others would see this rank's tokens alone"
            )
        return methods  # type: ignore[return-value]


class Llama(nn.Module):
    """Decoder-only transformer: RMS norms before each branch, SwiGLU, rotary positions.

    With a landmark layer, the model inserts the landmark tokens itself and drops their outputs:
    texts, labels and logits know nothing of them.

    With ring layers every rank of `group` holds its rows of each text (`cp.shard`), which `hidden`
    and `forward` take with their plan; `loss` and `generate` take whole texts and cut them.

    >>> config = LlamaConfig(vocab_size=97, d_model=32, num_layers=2, num_heads=4,
    ...                      attention=["full", "infini"], options={"infini": {"segment_len": 8}})
    >>> model, ids = Llama(config), torch.randint(97, (2, 20))
    >>> model(ids).shape, model.loss(ids, ids).shape, model.generate(ids, 5).shape
    (torch.Size([2, 20, 97]), torch.Size([]), torch.Size([2, 25]))
    """

    def __init__(self, config: LlamaConfig, group: Any = None) -> None:
        super().__init__()
        methods = config.methods()
        self.config = config
        self.ranks = Ranks(group) if "ring" in methods else None
        self.remat = _remat.policy_of("LlamaConfig", "remat", config.remat)
        block_size = config.options.get("landmark", {}).get("block_size", 64)
        self.mem_freq = block_size - 1 if "landmark" in methods else None
        rows = config.vocab_size + (self.mem_freq is not None)
        self.embedding = nn.Embedding(rows, config.d_model)
        self.layers = nn.ModuleList(Layer(config, method) for method in methods)
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.output = None
        if not config.tie:
            self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.apply(_initialize)
        for layer in self.layers if self.ranks is not None else ():
            layer.attention.ranks = self.ranks  # type: ignore[union-attr]

    def new_states(self) -> list[Any]:
        """An empty state per layer for `forward(ids, states)`."""
        return [layer.attention.new_state() for layer in self.layers]  # type: ignore[union-attr,operator]

    def hidden(
        self, ids: Tensor, states: list[Any] | None = None, seen: int = 0, plan: Plan | None = None
    ) -> Tensor:
        """ids (B, T) to the last hidden states (B, T, d_model); `seen` tokens are in the states.

        plan: Of ring layers, whose rows the ids are; None is that of ranks with T tokens each.
        """
        x = self.embedding(ids)
        inserted = None
        if self.mem_freq is not None:
            inserted = insertion(ids.shape[1], self.mem_freq, [seen], None, ids.device)
            x = spread(x, inserted, self.embedding.weight[self.config.vocab_size], None)
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            options = {} if self.ranks is None else {"plan": plan}
            x = _remat.run(self.remat if state is None else KEEP, layer, x, state, **options)
        x = x if inserted is None else gather(x, inserted)
        normed: Tensor = self.norm(x)
        return normed

    @property
    def output_weight(self) -> Tensor:
        """(V, d_model) of the output layer."""
        if self.output is None:
            return self.embedding.weight[: self.config.vocab_size]
        return self.output.weight

    def forward(
        self, ids: Tensor, states: list[Any] | None = None, seen: int = 0, plan: Plan | None = None
    ) -> Tensor:
        """ids (B, T) int64 to logits (B, T, V); with states, ids are the next tokens."""
        return functional.linear(self.hidden(ids, states, seen, plan), self.output_weight)

    def loss(
        self, ids: Tensor, labels: Tensor, ignore_index: int = -100, plan: Plan | None = None
    ) -> Tensor:
        """Mean cross entropy of every token given those before it; token i predicts labels[i + 1].

        ids, labels: (B, T) int64. With ring layers whole texts on every rank, and the result is
        this rank's share of the mean: losses and gradients of the ranks add up. plan: Of ring
        layers; None is one of their layout, for a single document.
        """
        if self.ranks is not None:
            return self._shared_loss(ids, labels, ignore_index, plan)
        hidden, targets = self.hidden(ids)[:, :-1], labels[:, 1:]
        return blockwise_cross_entropy(
            hidden, self.output_weight.to(hidden.dtype), targets,
            chunk_size=self.config.loss_chunk, ignore_index=ignore_index,
        )  # fmt: skip

    def _shared_loss(
        self, ids: Tensor, labels: Tensor, ignore_index: int, plan: Plan | None
    ) -> Tensor:
        group = process_group(self.ranks and self.ranks.group, "Llama.loss")
        plan = self._plan(ids.shape[1], group) if plan is None else plan
        ends = torch.tensor(plan.documents, dtype=torch.int32)
        shifted = shift_labels(labels, ignore_index=ignore_index, cu_seqlens=ends)
        mine, targets = (shard(plan, x, 1, group.rank()) for x in (ids, shifted))
        hidden = self.hidden(mine, plan=plan)
        total = blockwise_cross_entropy(
            hidden, self.output_weight.to(hidden.dtype), targets.contiguous(),
            chunk_size=self.config.loss_chunk, ignore_index=ignore_index, reduction="sum",
        )  # fmt: skip
        return total / (shifted != ignore_index).sum()

    def _plan(self, length: int, group: Any) -> Plan:
        """That of a single text of this length."""
        layout = self.config.options.get("ring", {}).get("layout", "zigzag")
        return make_plan(length, group.size(), layout=layout)

    def _next_logits(self, ids: Tensor, states: list[Any], seen: int) -> Tensor:
        """Logits (B, V) of the token behind these, the same on every rank."""
        if self.ranks is None or seen:
            last = self.hidden(ids, states, seen)[:, -1]
        else:  # a prompt, of which each rank reads its part
            group = process_group(self.ranks.group, "Llama.generate")
            tokens = zlib.crc32(ids.cpu().numpy().tobytes())
            note = {"prompts": list(ids.shape), "tokens": tokens}
            begin(group, "Llama.generate", ids, note, remember=False)
            plan, end = self._plan(ids.shape[1], group), torch.tensor([ids.shape[1] - 1])
            hidden = self.hidden(shard(plan, ids, 1, group.rank()), states, plan=plan)
            last = rows_at(plan, hidden, 1, end, group, "Llama.generate", {})[:, 0]
        return functional.linear(last, self.output_weight)

    def _same_on_every_rank(self, token: Tensor) -> Tensor:
        if self.ranks is not None:
            group = process_group(self.ranks.group, "Llama.generate")
            torch.distributed.broadcast(token, group=group, group_src=0)
        return token

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """ids (B, T >= 1) continued to (B, T + max_new_tokens), or less if all rows end with eos.

        With ring layers every rank has the whole prompts and gets the whole result; keys and values
        are split over the ranks, and it is rank 0 that samples.

        Args:
            ids: Prompts of one length.
            max_new_tokens: Tokens to add.
            temperature: 0 takes the likeliest token.
            top_k, top_p: Sample from the likeliest top_k tokens, or from those that hold top_p of
                the probability.
            eos: Token after which a row is filled with eos.
            chunk: Tokens of the prompt that are read at a time; None is all, as with ring layers.
            generator: Source of randomness.

        Raises:
            ValueError: An empty prompt, or limits of `sample` that leave no token; with ring layers
                a chunk, or ranks with different prompts.
        """
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(
                f"Llama.generate: ids has shape {tuple(ids.shape)}; expected (B, T) with T >= 1; "
                "nearest is a prompt of one token"
            )
        if self.ranks is not None and chunk is not None:
            raise ValueError(
                f"Llama.generate: chunk is {chunk} with ring layers; expected None: the ranks read "
                "the prompt at once"
            )
        states, seen, ended = self.new_states(), 0, torch.zeros_like(ids[:, 0], dtype=torch.bool)
        with evaluating(self):
            for part in ids.split(chunk or ids.shape[1], dim=1):
                logits = self._next_logits(part, states, seen)
                seen += part.shape[1]
            for step in range(max_new_tokens):
                token = self._same_on_every_rank(
                    sample(logits, temperature, top_k, top_p, generator)
                )
                token = token if eos is None else token.masked_fill(ended, eos)
                ids = torch.cat([ids, token[:, None]], dim=1)
                ended |= token == eos if eos is not None else False
                if bool(ended.all()) or step == max_new_tokens - 1:
                    break
                logits, seen = self._next_logits(token[:, None], states, seen), seen + 1
        return ids


class Layer(nn.Module):
    """Attention and SwiGLU, each after a norm and added to what came in."""

    def __init__(self, config: LlamaConfig, method: str) -> None:
        super().__init__()
        d_ff = config.d_ff or -(-config.d_model * 8 // 3 // 64) * 64
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = make_attention(config, method)
        self.ffn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.gate_proj = nn.Linear(config.d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, config.d_model, bias=False)
        self.dropout, self.ffn_chunk = nn.Dropout(config.dropout), config.ffn_chunk
        remat = config.ffn_chunk > 0 if config.ffn_remat is None else config.ffn_remat
        self.ffn_remat = _remat.policy_of("LlamaConfig", "ffn_remat", remat)

    def forward(self, x: Tensor, state: Any = None, **options: Any) -> Tensor:
        """x (B, T, d_model) to the same shape; with a state, x are the next tokens."""
        x = x + self.attention(self.attention_norm(x), state, **options)
        if self.ffn_chunk:
            return x + blockwise_feedforward(
                self.feedforward, x, self.ffn_chunk, remat=self.ffn_remat
            )
        return x + _remat.run(self.ffn_remat, self.feedforward, x)

    def feedforward(self, x: Tensor) -> Tensor:
        """The second branch."""
        x = self.ffn_norm(x)
        y: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.dropout(y)  # type: ignore[no-any-return]


def make_attention(config: LlamaConfig, method: str) -> nn.Module:
    """The attention layer of a method, with its options."""
    shape: dict[str, Any] = {
        "num_kv_heads": config.num_kv_heads, "rope_base": config.rope_base,
        "dropout": config.dropout,
    }  # fmt: skip
    options = dict(config.options.get(method, {}))
    if method == "dilated":
        rates, lengths = options.pop("dilation_rates", 1), options.pop("segment_lengths", 2048)
        if options.get("use_xpos"):
            shape["rope_base"] = None
        return DilatedAttention(
            config.d_model, config.num_heads, rates, lengths, causal=True, **shape, **options
        )
    layers: dict[str, type[SelfAttention]] = {
        "full": FullAttention,
        "infini": InfiniAttention,
        "landmark": LandmarkAttention,
        "ring": RingAttention,
    }
    return layers[method](config.d_model, config.num_heads, **shape, **options)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
