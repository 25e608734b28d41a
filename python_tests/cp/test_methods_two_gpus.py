"""The other methods between two GPUs, or two processes on one, as accurate as one GPU.

But for what has been rounded to 16 bits on the way: gradients of keys that both ranks have used,
and the branches of dilated attention that cross ranks.
"""

import cp_gpu_methods as methods
import pytest
import torch
from gpu_checks import needs_kernel
from processes import run_ranks_well

pytestmark = [*needs_kernel("ring_bwd"), pytest.mark.dist]

OUT_RATIO, BRANCHES_RATIO, KEYS_RATIO = 1.02, 1.15, 1.45


@pytest.mark.parametrize(
    "name, layout",
    [
        ("infini linear", "contiguous"),
        ("infini delta", "contiguous"),
        ("landmark", "zigzag"),
        ("landmark", "contiguous"),
        ("dilated", "zigzag"),
        ("dilated", "contiguous"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_those_of_one_gpu(name, layout, dtype):
    for ratios in run_ranks_well(methods.error_ratios, 2, name, layout, dtype):
        rows = BRANCHES_RATIO if name == "dilated" else OUT_RATIO
        assert max(ratios[:2]) <= rows and max(ratios[2:]) <= KEYS_RATIO, ratios


def test_decoding_over_a_cache_on_two_ranks():
    for ratios in run_ranks_well(methods.decoding, 2):
        assert max(ratios) <= OUT_RATIO, ratios


def test_shards_that_move():
    run_ranks_well(methods.moving, 2)
