"""ring_attention between more ranks than GPUs: the bits of the simulation."""

import cp_gpu_random
import cp_gpu_workers as workers
import pytest
import torch
from gpu_checks import needs_kernel
from processes import run_ranks_well

pytestmark = [*needs_kernel("ring_bwd"), pytest.mark.dist]


@pytest.mark.parametrize("n, gpus", [(3, 1), (4, 1), (4, 2)])
def test_ranks_that_share_gpus(n, gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    hops = run_ranks_well(workers.check_many_ranks, n, gpus)
    assert min(hops) > 100


@pytest.mark.parametrize("n, gpus", [(2, 1), (2, 2), (3, 1)])
def test_the_same_bits_every_time(n, gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    run_ranks_well(workers.the_same_again, n, gpus)


def test_keys_that_are_overwritten_after_a_call():
    run_ranks_well(workers.keys_overwritten, 3)


@pytest.mark.parametrize("transport, n", [("p2p", 2), ("p2p", 3), ("p2p", 4), ("nccl", 2)])
def test_random_calls(transport, n):
    hops = run_ranks_well(cp_gpu_random.random_calls, n, transport, 60)
    assert min(hops) > 100
