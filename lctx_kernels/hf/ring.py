"""Ring attention in transformers' registries: every rank runs the model on its part of a text."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..cp.groups import Ranks, process_group
from ..cp.plan import Plan, make_plan
from ..cp.shard import shard, shard_positions, shift_labels
from ..ring import ring_attention
from ._compat import AttentionInterface, AttentionMaskInterface, PreTrainedModel
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Ring attention of this rank's tokens, inside the layer's sliding window if it has one.

    query (B, Hq, L, D), key, value (B, Hkv, L, D) of this rank. Returns (B, L, Hq, D) and None.

    Raises:
        NotImplementedError: A mask, dropout, soft-capped scores.
    """
    where = type(module).__name__
    if attention_mask is not None:
        raise NotImplementedError(f"{where}: attention_mask is given; expected None with a ring")
    refuse_in_scores(where, dropout, kwargs.get("softcap"))
    if ring_plan is None:
        raise RuntimeError(f"{where} was called outside of its converted model; expected a call of "
                           "the model")  # fmt: skip
    options = module.config.lctx["options"]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = ring_attention(
        q, k, v, group=ring_group, plan=ring_plan, scale=scaling,
        window=kwargs.get("sliding_window"), deterministic=options["deterministic"],
        timeout=options["timeout"],
    )  # fmt: skip
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
        """As the class that it replaces, for this rank's rows of `ring_plan`."""
        where, inputs = type(self).__name__, input_ids if input_ids is not None else inputs_embeds
        refuse_other_attention(self, NAME, kwargs)
        if inputs is None:
            raise ValueError(f"{where}: expected one of input_ids and inputs_embeds")
        if past_key_values is not None or use_cache:
            refuse_cache(where)
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise NotImplementedError(
                f"{where}: attention_mask has pads; expected none: pads behind a text need no "
                "mask, only labels of -100; texts of different lengths are documents of a plan"
            )
        group = process_group(self._lctx_ranks.group, where)
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


def refuse_cache(where: str) -> NoReturn:
    """A model over ranks does not generate."""
    raise NotImplementedError(
        f"{where}: use_cache is True or past_key_values is given; expected neither: a model over "
        "ranks reads and trains, it does not generate; nearest is the saved model without a ring "
        "(its weights are those of the base), or cp.decode_attention"
    )


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
    ranks, options = next(
        (module._lctx_ranks, module.config.lctx["options"])
        for module in model.modules()
        if isinstance(module, RingBackbone)
    )
    group = process_group(ranks.group, "hf.shard_inputs")
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
