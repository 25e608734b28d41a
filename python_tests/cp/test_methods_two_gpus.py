"""The other methods between two GPUs, or two processes on one: as accurate as one GPU.

What ranks add up of landmark and dilated attention, gradients of keys that both have used, each
has rounded to 16 bits before.
"""

import cp_gpu_methods as methods
import pytest
import torch
from gpu_checks import needs_kernel
from processes import run_ranks_well

pytestmark = [*needs_kernel("ring_bwd"), pytest.mark.dist]

OUT_RATIO, GRAD_RATIO = 1.05, 1.6


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
        out, *grads = ratios
        print(ratios)
        assert out <= OUT_RATIO and max(grads) <= GRAD_RATIO, ratios


def test_decoding_over_a_cache_on_two_ranks():
    for ratios in run_ranks_well(methods.decoding, 2):
        assert max(ratios) <= OUT_RATIO, ratios


def test_shards_that_move():
    run_ranks_well(methods.moving, 2)
