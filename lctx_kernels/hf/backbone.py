"""Backbones of converted models: what every forward needs before and after the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import RopeTable
from ..cache.rows import Span
from ..data.landmarks import Insertion, gather, insertion, spread
from ..nn.gate import MemoryGate
from . import dilated
from ._compat import PreTrainedModel, init
from .attention import rope_table
from .cache import ConvertedCache, make_cache
from .context import Context, require_running_positions, token_spans
from .options import refuse_other_attention, refuse_weights


class ConvertedBackbone(PreTrainedModel):  # type: ignore[misc]
    """Mixed into the backbone class of a model family, before it."""

    @property
    def spec(self) -> dict[str, Any]:
        """{"method", "layers", "options"} of the conversion."""
        spec: dict[str, Any] = self.config.lctx
        return spec

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryGate):
            init.constant_(module.weight, module.init)
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ConvertedCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the class that it replaces, but for use_cache=None, which is False here."""
        where = type(self).__name__
        refuse_weights(where, self.config, kwargs)
        if self.training and getattr(self, "gradient_checkpointing", False):
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = make_cache(self)
        if past_key_values is not None and not isinstance(past_key_values, ConvertedCache):
            raise TypeError(
                f"{where}: past_key_values is {type(past_key_values).__name__}; expected the "
                "result of lctx_kernels.hf.make_cache(model), or None"
            )
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError(f"{where}: expected exactly one of input_ids and inputs_embeds")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        cached = past_key_values is not None
        spans = token_spans(attention_mask, past, inputs.shape[1], cached, where)
        require_running_positions(position_ids, spans, where)
        return_dict = kwargs.pop("return_dict", None)
        outputs = self.run_layers(
            inputs, spans, past_key_values, attention_mask=attention_mask,
            position_ids=position_ids, use_cache=bool(use_cache), **kwargs,
        )  # fmt: skip
        return outputs.to_tuple() if return_dict is False else outputs

    def run_layers(
        self, inputs: Tensor, spans: list[Span] | None, cache: ConvertedCache | None, **kwargs: Any
    ) -> Any:
        """The forward of the family with a context for the converted layers."""
        raise NotImplementedError

    def run_family(self, **kwargs: Any) -> Any:
        """The forward of the class that this one is mixed into."""
        return super().forward(**kwargs)

    def seen(self, cache: ConvertedCache | None, B: int) -> list[int]:
        """Tokens that each row has seen at the converted layers."""
        return [0] * B if cache is None else cache.seen(self.spec["layers"][0], B)


class DilatedBackbone(PreTrainedModel):  # type: ignore[misc]
    """Checks what the attention function cannot see; mixed into the backbone class of a family."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the class that it replaces."""
        where, inputs = type(self).__name__, input_ids if input_ids is not None else inputs_embeds
        refuse_other_attention(self, dilated.NAME, kwargs)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        T = 0 if inputs is None else inputs.shape[1]
        spans = token_spans(attention_mask, past, T, True, where)
        require_running_positions(position_ids, spans, where)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip


def _from(first: Sequence[int], T: int, device: torch.device) -> Tensor:
    """(B or 1, T) running numbers from those of every row; rows that agree make no GPU wait."""
    columns = torch.arange(T, device=device)[None]
    if len(set(first)) == 1:
        return columns + first[0]
    return columns + torch.tensor(first, device=device)[:, None]


def _inputs(x: Tensor) -> dict[str, Tensor]:
    return {"inputs_embeds": x} if x.is_floating_point() else {"input_ids": x}


class InfiniBackbone(ConvertedBackbone):
    """Positions restart in every segment where all layers are converted."""

    def run_layers(
        self,
        inputs: Tensor,
        spans: list[Span] | None,
        cache: ConvertedCache | None,
        memory: Any = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See ConvertedBackbone.run_layers. memory: a SegmentMemory."""
        if len(self.spec["layers"]) == self.config.num_hidden_layers:
            attention_mask = None  # no layer is left that takes one
            position_ids = self._positions(inputs, spans, cache)
        elif memory is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: `memory` with layers {self.spec['layers']} converted; "
                "expected all layers: the others would not see earlier segments"
            )
        context = Context(inputs.shape[1], spans, memory)
        return self.run_family(
            **_inputs(inputs), attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, lctx=context, **kwargs,
        )  # fmt: skip

    def _positions(
        self, inputs: Tensor, spans: Sequence[Span] | None, cache: ConvertedCache | None
    ) -> Tensor:
        """(B or 1, T) positions inside the segments of every row; 0 for pads."""
        B, T = inputs.shape[:2]
        seen = self.seen(cache, B)
        starts = [0] * B if spans is None else [start for start, _ in spans]
        first = [n - start for n, start in zip(seen, starts, strict=True)]
        positions = _from(first, T, inputs.device)
        inside: Tensor = positions.clamp(min=0) % self.spec["options"]["segment_len"]
        return inside


class LandmarkBackbone(ConvertedBackbone):
    """Inserts the landmark tokens, feeds long inputs in chunks, gives the ordinary tokens back."""

    def run_layers(
        self,
        inputs: Tensor,
        spans: list[Span] | None,
        cache: ConvertedCache | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See ConvertedBackbone.run_layers."""
        options = self.spec["options"]
        if not options["insert"]:
            return self._with_given_landmarks(inputs, spans, cache, **kwargs)
        chunk = self._chunk_len(cache)
        if chunk is None or inputs.shape[1] <= chunk:
            return self._chunk(inputs, spans, cache, **kwargs)
        if cache is not None:
            self._reserve(cache, inputs.shape[1])
        parts = []
        for start in range(0, inputs.shape[1], chunk):
            part = inputs[:, start : start + chunk]
            T = part.shape[1]
            inside = None
            if spans is not None:
                inside = [tuple(min(max(x - start, 0), T) for x in span) for span in spans]
            parts.append(self._chunk(part, inside, cache, **kwargs))  # type: ignore[arg-type]
        outputs = parts[-1]
        outputs.last_hidden_state = torch.cat([part.last_hidden_state for part in parts], dim=1)
        if outputs.hidden_states is not None:
            layers = zip(*(part.hidden_states for part in parts), strict=True)
            outputs.hidden_states = tuple(torch.cat(layer, dim=1) for layer in layers)
        return outputs

    def _chunk_len(self, cache: ConvertedCache | None) -> int | None:
        """Ordinary tokens to feed at a time; None is all of them."""
        if cache is None or self._top_k(cache) is None:
            return None
        options = self.spec["options"]
        if options["chunk_len"] is not None:
            return int(options["chunk_len"])
        prefix = (self._top_k(cache) + 2) * options["block_size"]  # type: ignore[operator]
        left = self.config.max_position_embeddings - prefix
        return int(max(options["block_size"] - 1, min(2048, left)))

    def _reserve(self, cache: ConvertedCache, columns: int) -> None:
        """Room for all blocks of a long input, before its parts come."""
        tokens = columns + columns // (self.spec["options"]["block_size"] - 1) + 1
        for layer in self.spec["layers"]:
            for state in cache.layers[layer].rows.states:
                state.reserve(tokens)

    def _top_k(self, cache: ConvertedCache) -> int | None:
        top_k: int | None = getattr(cache.layers[0].rows.states[0], "top_k", None)
        return top_k

    def _chunk(
        self, inputs: Tensor, spans: list[Span] | None, cache: ConvertedCache | None, **kwargs: Any
    ) -> Any:
        """One forward of ordinary tokens."""
        options, B = self.spec["options"], inputs.shape[0]
        mem_freq = options["block_size"] - 1
        seen_with_landmarks = self.seen(cache, B)
        seen = [n - n // options["block_size"] for n in seen_with_landmarks]
        inserted = insertion(inputs.shape[1], mem_freq, seen, spans, inputs.device)
        filler = torch.full((), options["landmark_id"], device=inputs.device)
        if inputs.is_floating_point():
            filler = self.embed_tokens(filler)
        tokens = spread(inputs, inserted, filler, spans)
        outputs = self._run(tokens, inserted.spans, cache, seen_with_landmarks, inputs.shape[1],
                            **kwargs)  # fmt: skip
        return _without_landmarks(outputs, inserted)

    def _with_given_landmarks(
        self, inputs: Tensor, spans: list[Span] | None, cache: ConvertedCache | None, **kwargs: Any
    ) -> Any:
        """One forward of tokens among which the landmarks already stand."""
        if cache is not None or inputs.is_floating_point():
            raise NotImplementedError(
                f"{type(self).__name__}: insert is False with "
                f"{'a cache' if cache is not None else 'inputs_embeds'}; expected input_ids "
                'without a cache: set model.config.lctx["options"]["insert"] = True to generate, '
                "and give ordinary tokens alone"
            )
        marks = inputs == self.spec["options"]["landmark_id"]
        if spans is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: insert is False with pads before tokens; expected pads on "
                "the right"
            )
        seen = [0] * inputs.shape[0]
        return self._run(inputs, None, None, seen, inputs.shape[1], marks, **kwargs)

    def _run(
        self, tokens: Tensor, spans: list[Span] | None, cache: ConvertedCache | None,
        seen: Sequence[int], columns: int, marks: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        positions = _from(seen, tokens.shape[1], tokens.device)
        rope = None
        if cache is not None and (top_k := self._top_k(cache)) is not None:
            size = (top_k + 2) * self.spec["options"]["block_size"] + tokens.shape[1]
            rope = self._rope(size, tokens.device)
            positions = _from([0], tokens.shape[1], tokens.device)  # not read
        context = Context(columns, spans, is_landmark=marks, rope=rope)
        return self.run_family(
            **_inputs(tokens), position_ids=positions, past_key_values=cache, lctx=context, **kwargs
        )

    def _rope(self, size: int, device: torch.device) -> RopeTable:
        """The model's own rotary embedding at positions 0 to size - 1, in fp32."""
        table: Tensor | None = self.__dict__.get("_lctx_rope")
        if table is None or table.shape[1] < size or table.device != device:
            kind = getattr(self.rotary_emb, "rope_type", "default")
            if kind in ("dynamic", "longrope"):
                raise NotImplementedError(
                    f"{type(self).__name__}: retrieval with the rotary embedding {kind!r}, whose "
                    "frequencies change with the length; expected another one, or top_k=None"
                )
            gemma3 = self.config.model_type.endswith("gemma3_text")
            layer_type = "full_attention" if gemma3 else None
            table = rope_table(self.rotary_emb, size, device, layer_type)
            self.__dict__["_lctx_rope"] = table
        return RopeTable(table)


def _without_landmarks(outputs: Any, inserted: Insertion) -> Any:
    outputs.last_hidden_state = gather(outputs.last_hidden_state, inserted)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(gather(x, inserted) for x in outputs.hidden_states)
    return outputs
