"""Attention layers of converted models: transformers' parameters, this package's attention."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import Rows
from ..infini import infini_attention
from ..landmark import landmark_attention
from ._compat import FAMILIES
from .cache import ConvertedCache, ConvertedLayer, state_maker
from .context import Context
from .options import refuse_in_scores


class ConvertedAttention(nn.Module):
    """What converted layers share; mixed into the attention class of a model family."""

    family: str
    method: str
    config: Any
    layer_idx: int
    memory_gate: Any
    attention_dropout: float
    attn_logit_softcapping: float | None

    def options(self) -> dict[str, Any]:
        """Options of the conversion."""
        options: dict[str, Any] = self.config.lctx["options"]
        return options

    @property
    def softcap(self) -> float | None:
        """What Gemma 2 caps scores at; other families have the name and no such thing."""
        return self.attn_logit_softcapping if self.family == "gemma2" else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, T, Hq, D), k and v (B, T, Hkv, D), normed where the family does, not rotated."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # type: ignore[operator]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[operator]
        return q, k, v

    def rotate(self, q: Tensor, k: Tensor, embeddings: tuple[Tensor, Tensor]) -> Any:
        """q and k rotated by the model's own (cos, sin)."""
        return FAMILIES[self.family].rotate(q, k, *embeddings, unsqueeze_dim=2)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ConvertedCache | None = None,
        lctx: Context | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the class that it replaces; (output, None): there are no attention weights."""
        if lctx is None or position_embeddings is None:
            raise RuntimeError(
                f"{type(self).__name__} was called outside of its converted model; expected a call "
                "of the model"
            )
        refuse_in_scores(type(self).__name__, self.attention_dropout if self.training else 0.0)
        layer: ConvertedLayer | None = None
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
        heads = self.attend(hidden_states, position_embeddings, layer, lctx)
        return self.o_proj(heads.flatten(2).to(hidden_states.dtype)), None  # type: ignore[operator]

    def attend(
        self,
        x: Tensor,
        embeddings: tuple[Tensor, Tensor],
        layer: ConvertedLayer | None,
        context: Context,
    ) -> Tensor:
        """(B, T, Hq, D) for x (B, T, hidden_size)."""
        raise NotImplementedError

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, layer: ConvertedLayer | None, context: Context,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """Attention by the states of `layer`, or by new ones for rows with pads."""
        if layer is not None:
            return layer.attend(q, k, v, context.columns, spans=context.spans, **options)
        every = {"top_k": None, "offload": False, "max_blocks": None}
        rows = Rows(state_maker(self.method, self.options() | every, self.softcap))
        return rows.attend(q, k, v, spans=context.spans, **options)


class InfiniMixin(ConvertedAttention):
    """Segments and a memory; `memory_gate` is the one new parameter."""

    method = "infini"

    def attend(
        self,
        x: Tensor,
        embeddings: tuple[Tensor, Tensor],
        layer: ConvertedLayer | None,
        context: Context,
    ) -> Tensor:
        """See ConvertedAttention.attend."""
        q_mem, k_mem, v = self.project(x)
        q, k = self.rotate(q_mem, k_mem, embeddings)
        shared: dict[str, Any] = {
            "q_mem": q_mem, "k_mem": k_mem, "gate": self.memory_gate(q), "scale": self.scaling,
        }  # fmt: skip
        if layer is not None or context.spans is not None:
            if context.memory is not None:
                raise NotImplementedError(
                    "a converted model got `memory` with a cache, or with pads before tokens; "
                    "expected one of them, and texts that start in the first column"
                )
            return self.run(q, k, v, layer, context, **shared)
        options, index = self.options(), self.layer_idx
        memory = context.memory
        if self.softcap is not None:
            return self._capped(q, k, v, shared, memory)
        out, mem = infini_attention(
            q, k, v, None if memory is None else memory.read.get(index), **shared,
            **{n: options[n] for n in ("segment_len", "update", "first", "detach_every")},
        )  # fmt: skip
        if memory is not None:
            memory.written[index] = mem
        return out

    def _capped(
        self, q: Tensor, k: Tensor, v: Tensor, shared: dict[str, Any], memory: Any
    ) -> Tensor:
        """The same in plain PyTorch, with capped scores."""
        state = state_maker("infini", self.options(), self.softcap)()
        state.detach_every = self.options()["detach_every"]
        state.mem = None if memory is None else memory.read.get(self.layer_idx)
        out: Tensor = state.attend(q, k, v, **shared)
        if memory is not None:
            state.close()
            memory.written[self.layer_idx] = state.mem
        return out


class LandmarkMixin(ConvertedAttention):
    """Grouped softmax; no new parameter."""

    method = "landmark"

    def attend(
        self,
        x: Tensor,
        embeddings: tuple[Tensor, Tensor],
        layer: ConvertedLayer | None,
        context: Context,
    ) -> Tensor:
        """See ConvertedAttention.attend."""
        q, k, v = self.project(x)
        shared: dict[str, Any] = {"scale": self.scaling}
        if layer is not None and context.rope is not None:
            return self.run(q, k, v, layer, context, rope=context.rope, **shared)
        q, k = self.rotate(q, k, embeddings)
        if layer is not None or context.spans is not None:
            return self.run(q, k, v, layer, context, **shared)
        marks = context.is_landmark
        block_size = self.options()["block_size"] if marks is None else None
        return landmark_attention(
            q, k, v, block_size=block_size, is_landmark=marks, scale=shared["scale"]
        )


MIXINS: dict[str, type[ConvertedAttention]] = {"infini": InfiniMixin, "landmark": LandmarkMixin}


def __getattr__(name: str) -> Any:
    """Classes of converted layers by name: pickle asks for them in a process that has made none."""
    for method in MIXINS:
        for family, entry in FAMILIES.items():
            if name == f"{method.capitalize()}{entry.prefix}Attention":
                return attention_class(family, method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def attention_class(family: str, method: str) -> type[nn.Module]:
    """The attention class of a family with a method in it."""
    base = FAMILIES[family].load("Attention")
    name = f"{method.capitalize()}{base.__name__}"
    return type(name, (MIXINS[method], base), {"family": family, "__module__": __name__})


def rope_table(rotary: Any, size: int, device: torch.device, layer_type: str | None) -> Tensor:
    """(2, size, D) fp32 cos and sin of a model's rotary embedding at positions 0 to size - 1."""
    positions = torch.arange(size, device=device)[None]
    like = torch.zeros(1, device=device, dtype=torch.float32)
    arguments = (like, positions) if layer_type is None else (like, positions, layer_type)
    with torch.no_grad():
        cos, sin = rotary(*arguments)
    return torch.stack([cos[0], sin[0]])
