"""ring_attention between two GPUs: every transport gives the bits of the simulation."""

import cp_gpu_workers as workers
import pytest
import torch
from gpu_checks import needs_kernel
from processes import run_ranks_well

pytestmark = [
    *needs_kernel("ring_bwd"),
    pytest.mark.dist,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

TRANSPORTS = ("pg",)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_case(transport):
    hops = run_ranks_well(workers.check_all, 2, transport)
    assert min(hops) > 50


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_calls_in_flight(transport):
    run_ranks_well(workers.many_calls, 2, transport)
