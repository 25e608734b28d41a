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

from .dilated import check_plan
from .groups import member
from .plan import Plan
from .shard import unshard

Rows = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def landmark_over_ranks(
    attend: Rows, q: Tensor, k: Tensor, v: Tensor, is_landmark: Tensor | None, *, group: Any,
    plan: Plan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of this rank's rows; attend(q, k, v, is_landmark): q are the last rows of k.

    Raises:
        ValueError: A plan that does not fit.
    """
    rank = member(group, plan.world_size, "landmark_attention")[1]
    check_plan(plan, rank, q.shape[1], "landmark_attention")
    k, v = (unshard(plan, x, 1, group) for x in (k, v))
    landmarks = None if is_landmark is None else unshard(plan, is_landmark, 1, group)
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
