"""Context parallelism: which rank holds which tokens of one long sequence, and what that costs.

>>> import torch
>>> from lctx_kernels import cp
>>> plan = cp.make_plan(10, 2)  # zigzag: rank 0 holds the first and the last quarter
>>> cp.shard(plan, torch.arange(10), 0, 0).tolist()
[0, 1, 7, 8, 9]
"""

from .decode import decode_attention
from .forecast import Forecast, forecast
from .plan import Plan, make_plan
from .registry import dump_hop_log, hop_log, synchronize
from .shard import roll, shard, shard_positions, shift_labels, unshard
from .transport import RingError

__all__ = [
    "Forecast",
    "Plan",
    "RingError",
    "decode_attention",
    "dump_hop_log",
    "forecast",
    "hop_log",
    "make_plan",
    "roll",
    "shard",
    "shard_positions",
    "shift_labels",
    "synchronize",
    "unshard",
]
