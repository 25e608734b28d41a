"""Landmark attention over ranks: keys are gathered, queries stay.

A row weighs the tokens of a whole block by the block's own softmax, so that blocks may straddle
ranks only if a rank sees all of their keys: each rank gathers k and v, and computes its own rows.
Memory is that of the keys of the whole sequence; the work is balanced by a zigzag plan.
Source: Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .agree import rank_of_rows, tensor_facts
from .plan import Plan
from .shard import whole

OP = "landmark_attention"
Rows = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def landmark_over_ranks(
    attend: Rows, q: Tensor, k: Tensor, v: Tensor, is_landmark: Tensor | None, *,
    options: dict[str, Any], group: Any, plan: Plan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of this rank's rows; attend(q, k, v, is_landmark): q are the last rows of k.

    options: what else all ranks must have in common.

    Raises:
        ValueError: A plan that does not fit, or ranks that were called with different arguments.
        RingError: A rank does not come.
    """
    rank = rank_of_rows(plan, q, group, OP)
    note = {**tensor_facts(q.shape, v.shape, q.dtype), **options, "marks": is_landmark is not None}
    k = whole(plan, k, 1, group, OP, note)
    v = whole(plan, v, 1, group, OP, {})
    landmarks = None if is_landmark is None else whole(plan, is_landmark, 1, group, OP, {})
    results, row = [attend(q[:, :0], k[:, :0], v[:, :0], _until(landmarks, 0))], 0
    for p in plan.ranges[rank]:
        end = p.stop
        queries = q[:, row : row + len(p)]
        results.append(attend(queries, k[:, :end], v[:, :end], _until(landmarks, end)))
        row += len(p)
    out, lse = zip(*results, strict=True)
    return torch.cat(out, 1), torch.cat(lse, 2)


def _until(landmarks: Tensor | None, end: int) -> Tensor | None:
    return None if landmarks is None else landmarks[:, :end].contiguous()
