"""Dilated attention over ranks: every branch is rings over the tokens that it selects.

Tokens of one phase are a shorter sequence whose segments are documents, so that the ring's own plan
knows what has to travel: nothing where segments lie inside ranks, else 1 / rate of the rows of each
key head that the phase's query heads read: 1 / rate of the keys where that is one phase, at most
all of them.
Source: Ding et al. 2023 (arXiv 2307.02486), sections 2.2 and 3.1.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._dtypes import stat_dtype
from ..merge import merge_attention
from .agree import begin, plan_facts, rank_of_rows, tensor_facts
from .plan import Plan, _spec, plan_of
from .shard import _positions

OP = "dilated_attention"
BRANCHES_SHOWN = 500  # characters of the branches that ranks compare
Partial = tuple[Tensor, Tensor]


def _selected_before(x: int, w: int, r: int, offset: int) -> int:
    """How many positions below x have (position mod w) mod r == offset."""
    whole, rest = divmod(x, w)
    return whole * len(range(offset, w, r)) + len(range(offset, rest, r))


@functools.lru_cache(maxsize=256)
def phase_plan(plan: Plan, w: int, r: int, offset: int) -> Plan:
    """The plan of the tokens with (position mod w) mod r == offset; segments are documents."""

    def before(x: int) -> int:
        return _selected_before(x, w, r, offset)

    ranges = [
        [[before(p.start), before(p.stop), 1] for p in held if before(p.start) < before(p.stop)]
        for held in plan.ranges
    ]
    bounds = [before(x) for x in (*range(0, plan.seq_len, w), plan.seq_len)]
    return plan_of(_spec("positions", bounds[-1], plan.world_size, bounds, ranges))


def _inside_ranks(plan: Plan, w: int) -> bool:
    """Whether no segment of w tokens lies on two ranks, and a rank's first token begins one."""
    return all(len(held) < 2 and all(p.start % w == 0 for p in held) for held in plan.ranges)


def _offsets(Hq: int, r: int, head_offset: str) -> dict[int, list[int]]:
    """Query heads of every phase."""
    heads: dict[int, list[int]] = {}
    for h in range(Hq):
        heads.setdefault(h % r if head_offset == "mod" else h // -(-Hq // r), []).append(h)
    return heads


def _key_heads(heads: list[int], G: int) -> list[int]:
    """Key heads of query heads: each once where all are read equally often, else one for each."""
    every = [h // G for h in heads]
    each = collections.Counter(every)
    return list(each) if len(set(each.values())) == 1 else every


def _merged(parts: Sequence[Partial], mix_grad: str) -> Partial:
    out, lse = functools.reduce(lambda a, b: merge_attention(*a, *b), parts)
    if mix_grad == "exact":
        return out, lse
    weights = [(x - lse).exp().nan_to_num(0).detach().transpose(1, 2) for _, x in parts]
    outs = [w.unsqueeze(-1) * part for w, (part, _) in zip(weights, parts, strict=True)]
    return torch.stack(outs).sum(0), lse


def dilated_over_ranks(
    local: Callable[[list[int], list[int]], Partial],
    ring: Callable[[Tensor, Tensor, Tensor, Plan], Partial],
    q: Tensor, k: Tensor, v: Tensor, branches: Sequence[tuple[int, int]], *, head_offset: str,
    mix_grad: str, options: dict[str, Any], group: Any, plan: Plan,
) -> Partial:  # fmt: skip
    """(out, lse) of this rank's rows.

    local(segment_lengths, dilation_rates): branches over the own rows. ring: attention over ranks.
    options: what else all ranks must have in common.

    Raises:
        ValueError: A plan that does not fit, or as `ring_attention`.
        RingError: As `ring_attention`.
    """
    rank = rank_of_rows(plan, q, group, OP)
    if not torch.compiler.is_compiling():  # there, only what travels is agreed on, by its ring
        begin(group, OP, q, {
            **tensor_facts(q.shape, v.shape, q.dtype), **plan_facts(plan), **options,
            "branches": str(list(branches))[:BRANCHES_SHOWN], "head_offset": head_offset,
            "mix_grad": mix_grad,
        })  # fmt: skip
    (B, L, Hq, _), Dv, G = q.shape, v.shape[-1], q.shape[2] // k.shape[2]
    stat, T = stat_dtype(q.dtype), max(plan.seq_len, 1)
    near = [b for b in branches if _inside_ranks(plan, min(b[0], T))]
    parts = []
    if near:
        out, lse = local([w for w, _ in near], [r for _, r in near])
        parts.append((out.to(stat), lse))
    positions = _positions(plan, rank)
    for w, r in (b for b in branches if b not in near):
        w = min(w, T)
        out = q.new_zeros(B, L, Hq, Dv, dtype=stat)
        lse = q.new_full((B, Hq, L), -torch.inf, dtype=stat)
        for offset, heads in _offsets(Hq, r, head_offset).items():
            rows = ((positions % w) % r == offset).nonzero().flatten().to(q.device)
            own = torch.tensor(heads, device=q.device)
            keys = torch.tensor(_key_heads(heads, G), device=q.device)
            a, b, c = (
                x.index_select(1, rows).index_select(2, h)
                for x, h in ((q, own), (k, keys), (v, keys))
            )
            some, some_lse = ring(a, b, c, phase_plan(plan, w, r, offset))
            out = out.index_put((torch.arange(B)[:, None, None], rows[:, None], own), some.to(stat))
            at = (torch.arange(B)[:, None, None], own[:, None], rows)
            lse = lse.index_put(at, some_lse)
        parts.append((out, lse))
    out, lse = _merged(parts, mix_grad)
    return out.to(q.dtype), lse
