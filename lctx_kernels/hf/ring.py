"""Ring attention in transformers' registries: every rank runs the model on its part of a text."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ..cp.agree import begin
from ..cp.groups import Ranks, process_group
from ..cp.plan import Plan, make_plan
from ..cp.shard import rows_at, shard, shard_positions, shift_labels
from ..ring import ring_attention
from ._compat import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from .cache import ConvertedCache, RingLayer, make_cache, ranks_of
from .options import refuse_in_scores, refuse_other_attention

NAME = "lctx_ring"
IGNORE = -100


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ring_plan: Plan | None = None,
    ring_group: Any = None,
    ring_cache: ConvertedCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Ring attention of this rank's tokens, inside the layer's sliding window if it has one.

    Without a plan the tokens are the next ones behind those of ring_cache, the same on every rank.

    query (B, Hq, L, D), key, value (B, Hkv, L, D) of this rank. Returns (B, L, Hq, D) and None.

    Raises:
        NotImplementedError: A mask, dropout, soft-capped scores.
    """
    where = type(module).__name__
    if attention_mask is not None:
        raise NotImplementedError(f"{where}: attention_mask is given; expected None with a ring")
    refuse_in_scores(where, dropout, kwargs.get("softcap"))
    if ring_plan is None and ring_cache is None:
        raise RuntimeError(f"{where} was called outside of its converted model; expected a call of "
                           "the model")  # fmt: skip
    options, window = module.config.lctx["options"], kwargs.get("sliding_window")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    layer: RingLayer | None = None if ring_cache is None else ring_cache.layers[module.layer_idx]
    if ring_plan is None and layer is not None:
        layer.rows.states[0].window = window
        return layer.attend(q, k, v, q.shape[1], spans=None, scale=scaling), None
    out = ring_attention(
        q, k, v, group=ring_group, plan=ring_plan, scale=scaling, window=window,
        deterministic=options["deterministic"], timeout=options["timeout"],
    )  # fmt: skip
    if layer is not None and ring_plan is not None:
        layer.read(ring_plan, ring_group.rank(), k.detach(), v.detach(), window)
    return out, None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The backbone refuses pads; documents are the plan's."""


def register() -> None:
    """Make `attn_implementation="lctx_ring"` known, with its mask function: both, always."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _no_mask)


class RingBackbone(PreTrainedModel):  # type: ignore[misc]
    """Gives every layer the plan and the group; mixed into the backbone class of a family."""

    _lctx_ranks: Ranks

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        ring_plan: Plan | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the class that it replaces, for this rank's rows of `ring_plan`.

        With a cache, the inputs are whole prompts, then the next tokens, on every rank alike; of a
        prompt the last token's hidden state comes back alone.
        """
        where, inputs = type(self).__name__, input_ids if input_ids is not None else inputs_embeds
        refuse_other_attention(self, NAME, kwargs)
        if inputs is None:
            raise ValueError(f"{where}: expected one of input_ids and inputs_embeds")
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise NotImplementedError(
                f"{where}: attention_mask has pads; expected none: pads behind a text need no "
                "mask, only labels of -100; texts of different lengths are documents of a plan"
            )
        group = process_group(self._lctx_ranks.group, where)
        if self.training and getattr(self, "gradient_checkpointing", False):
            use_cache, past_key_values = False, None
        if past_key_values is not None or use_cache:
            cache = self._cache(past_key_values, ring_plan)
            return self._generate(inputs, position_ids, cache, group, **kwargs)
        n, L = group.size(), inputs.shape[1]
        plan = ring_plan or make_plan(L * n, n, layout=self.config.lctx["options"]["layout"])
        if plan.world_size != n or plan.lengths[group.rank()] != L:
            raise ValueError(
                f"{where}: this rank has {L} tokens, rank {group.rank()} of {n}; expected "
                f"{plan.lengths[group.rank()] if plan.world_size == n else 'a part'} of the plan "
                f"of {plan.world_size} ranks; try hf.shard_inputs(model, inputs)"
            )
        positions = shard_positions(plan, group.rank())[None]
        if position_ids is None:
            position_ids = positions.to(inputs.device)
        elif not bool((position_ids.cpu() == positions).all()):
            raise ValueError(
                f"{where}: position_ids are not those of this rank's rows of the plan; expected "
                "None, or cp.shard_positions(plan, rank)"
            )
        return super().forward(
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds,
            use_cache=False, ring_plan=plan, ring_group=group, **kwargs,
        )  # fmt: skip

    def _cache(self, given: Any, plan: Plan | None) -> ConvertedCache:
        where = type(self).__name__
        if plan is not None:
            raise ValueError(
                f"{where}: ring_plan is given with a cache; expected whole prompts, and no plan"
            )
        cache = make_cache(self) if given is None else given
        if not isinstance(cache, ConvertedCache) or not isinstance(cache.layers[0], RingLayer):
            raise TypeError(
                f"{where}: past_key_values is {type(cache).__name__}; expected the result of "
                "lctx_kernels.hf.make_cache(model), or None"
            )
        return cache

    def _generate(
        self, inputs: Tensor, position_ids: Tensor | None, cache: ConvertedCache, group: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        where, seen, T = type(self).__name__, cache.get_seq_length(), inputs.shape[1]
        return_dict = kwargs.pop("return_dict", None)
        if T == 0:
            raise ValueError(f"{where}: the prompt is empty; expected one token at least")
        positions = torch.arange(seen, seen + T)[None]
        if position_ids is not None and not bool((position_ids.cpu() == positions).all()):
            raise ValueError(
                f"{where}: position_ids are not {seen} to {seen + T - 1}; expected those, or None"
            )
        plan = None
        if not seen:
            same_on_every_rank(where, inputs, group, {
                "prompts": list(inputs.shape), "tokens": _sum_of(inputs),
            })  # fmt: skip
            whole = make_plan(T, group.size(), layout=self.config.lctx["options"]["layout"])
            plan = whole if min(whole.lengths) else None  # transformers takes no empty texts
        if plan is not None:
            inputs, positions = (shard(plan, x, 1, group.rank()) for x in (inputs, positions))
        names = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        outputs = super().forward(
            **{names: inputs}, position_ids=positions.to(inputs.device), use_cache=False,
            ring_plan=plan, ring_group=group, ring_cache=cache, **kwargs,
        )  # fmt: skip
        if plan is not None:
            end = torch.tensor([T - 1])
            outputs.last_hidden_state = rows_at(
                plan, outputs.last_hidden_state, 1, end, group, where, {}
            )
        elif not seen:
            outputs.last_hidden_state = outputs.last_hidden_state[:, -1:]
        outputs.past_key_values = cache
        return outputs.to_tuple() if return_dict is False else outputs


def _sum_of(x: Tensor) -> int:
    return zlib.crc32(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def same_on_every_rank(where: str, x: Tensor, group: Any, note: dict[str, Any]) -> None:
    """Raise ValueError unless every rank says the same note; x is on the model's device."""
    begin(group, where, x, note, remember=False)


def check_generation(model: Any, where: str, generation_config: Any) -> None:
    """Refuse what ranks of a ring would not do alike, or not with the keys of each other.

    Raises:
        NotImplementedError: No cache, or decoding that takes tokens back.
        ValueError: Ranks with different options or random states.
    """
    if generation_config.use_cache is False:
        raise NotImplementedError(
            f"{where}: use_cache is False; expected True: over ranks every forward would read the "
            "whole prompt again"
        )
    device, drawn = model.device, 0
    if generation_config.do_sample:
        on_gpu = device.type == "cuda"
        drawn = _sum_of(torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state())
    group = process_group(ranks_of(model).group, where)
    same_on_every_rank(where, torch.empty(0, device=device), group, {
        "max_length": generation_config.max_length, "num_beams": generation_config.num_beams,
        "do_sample": generation_config.do_sample, "random state (torch.manual_seed)": drawn,
        "temperature": generation_config.temperature, "eos": str(generation_config.eos_token_id),
    })  # fmt: skip


def require_shifted(where: str, labels: Tensor | None, shift_labels: Tensor | None) -> None:
    """Refuse labels that the model would shift inside of a rank's part."""
    if labels is not None and shift_labels is None:
        raise ValueError(
            f"{where}: labels without shift_labels; expected both, shifted before the texts were "
            "cut: a rank's next row is not always the next token; try hf.shard_inputs(model, "
            "inputs)"
        )


def shard_inputs(model: Any, inputs: dict[str, Any], plan: Plan | None = None) -> dict[str, Any]:
    """See lctx_kernels.hf.shard_inputs."""
    options = next(m.config.lctx["options"] for m in model.modules() if isinstance(m, RingBackbone))
    group = process_group(ranks_of(model).group, "hf.shard_inputs")
    rank, n = group.rank(), group.size()
    mask = inputs.get("attention_mask")
    if mask is not None and bool((mask.diff(dim=1) > 0).any()):
        raise ValueError(
            "hf.shard_inputs: attention_mask has pads before tokens; expected pads on the right"
        )
    ids, labels = inputs["input_ids"], inputs.get("labels")
    if plan is None:
        plan = make_plan(ids.shape[1], n, layout=options["layout"])
    found: dict[str, Any] = {"input_ids": shard(plan, ids, 1, rank), "ring_plan": plan}
    if labels is not None:
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORE)
        bounds = torch.tensor(plan.documents, dtype=torch.int32)
        shifted = shift_labels(labels, cu_seqlens=bounds)
        mine = shard(plan, shifted, 1, rank).contiguous()
        found |= {"labels": mine, "shift_labels": mine}
        found["num_items_in_batch"] = (shifted != IGNORE).sum()
    return found
