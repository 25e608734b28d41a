"""ring_attention between two GPUs: every transport gives the bits of the simulation.

With one GPU two processes share it, and NCCL, which takes one process of a host there, sends from
"host" to "host".
"""

import cp_gpu_faults as faults
import cp_gpu_workers as workers
import pytest
import torch
from gpu_checks import needs_kernel
from processes import run_ranks, run_ranks_well

pytestmark = [*needs_kernel("ring_bwd"), pytest.mark.dist]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

OWN = ("p2p", "nccl")
TRANSPORTS = ("pg", *OWN)
TIMEOUT = 1.0
GRACE = 5.0
OWN_HOP_SECONDS = 6e-6


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_case(transport):
    hops = run_ranks_well(workers.check_all, 2, transport)
    assert min(hops) > 50


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_calls_in_flight(transport):
    run_ranks_well(workers.many_calls, 2, transport)


@needs_two
@pytest.mark.parametrize("transport", ["pg", "p2p", "nccl"])
def test_tensors_that_are_not_on_the_current_gpu(transport):
    run_ranks_well(workers.not_on_the_current_gpu, 2, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_first_call_that_sends_nothing(transport):
    run_ranks_well(workers.nothing_travels, 2, transport)


def test_registration_that_one_rank_is_refused():
    """Then no rank's memory is registered: with one side alone a hop would hang."""
    assert run_ranks_well(workers.refused_registration, 2) == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("transport", OWN)
def test_memory_of_a_million_tokens(transport):
    """Forward and backward, beyond inputs and results: that of the documented formula."""
    for found, promised in run_ranks_well(workers.memory_of_a_million_tokens, 2, transport):
        for taken, said in zip(found, promised, strict=True):
            assert 0.9 * said <= taken <= 1.01 * said, (found, promised)


def test_auto_takes_the_copy_engine():
    for name, phases, fewest in run_ranks_well(workers.what_auto_takes, 2):
        assert name == "CopyTransport" and fewest > 0
        assert sorted(set(phases)) == ["backward dkv", "backward kv", "forward kv"]


@needs_two
@pytest.mark.parametrize("transport", ["p2p", "nccl"])
def test_host_time_of_a_hop(transport):
    """Of the 12 us of a hop (bench.ring), what is not the driver's and NCCL's."""
    found = run_ranks_well(workers.host_seconds_of_a_hop, 2, transport, 4000)
    theirs, ours = (max(seconds) for seconds in zip(*found, strict=True))
    print(f"{transport}: {1e6 * theirs:.1f} us in the driver and NCCL, {1e6 * ours:.1f} us of ours")
    assert ours <= OWN_HOP_SECONDS


def check_ring_error(found, rank, phases):
    seconds, text, phase, step, peers = found
    assert seconds < TIMEOUT + GRACE, text
    assert phase in phases and step >= -1, text
    assert peers == (1 - rank,) and f"rank {rank} of 2 waited" in text
    assert "late, gone, or was called with other arguments" in text


PHASES = ("forward kv", "backward kv", "backward dkv")


@pytest.mark.parametrize("phase, step", [("forward kv", 0), ("backward dkv", 1)])
@pytest.mark.parametrize("transport", OWN)
def test_a_killed_rank(transport, phase, step):
    alive, dead = run_ranks(faults.killed, 2, transport, phase, step, TIMEOUT)
    assert dead.error == "died" and alive.error is None, alive.text
    error, keeps_its_memory = alive.value
    check_ring_error(error, 0, PHASES)
    assert keeps_its_memory  # nobody knows what the other rank still does


@pytest.mark.parametrize("transport", OWN)
def test_a_late_rank_and_a_new_group(transport):
    """The rank that waits says so in time, the late one by "p2p" when it waits for its hops."""
    found = run_ranks_well(faults.late_and_again, 2, transport, 3, TIMEOUT)
    for round_ in range(3):
        waiting = 1 - round_ % 2
        check_ring_error(found[waiting][round_], waiting, PHASES)


@pytest.mark.parametrize("transport", OWN)
@pytest.mark.parametrize("phase, step", [("forward kv", 0), ("backward dkv", 1)])
def test_a_rank_that_stops_in_the_middle(phase, step, transport):
    waits, stopped = run_ranks_well(faults.stopped, 2, transport, phase, step, TIMEOUT)
    check_ring_error(waits, 0, PHASES)
    if transport == "p2p":
        assert "rank 1 has given up" in waits[1]
    assert stopped == [
        "MemoryError: no memory for this hop",
        "RingError: rank 1: this group was given up: MemoryError in the middle of it: no memory "
        "for this hop; make another by torch.distributed.new_group",
    ]


@pytest.mark.parametrize("transport", OWN)
def test_the_last_hops_of_a_rank_that_ends(transport):
    """A process that ends with hops under way lets its peers have them first."""
    run_ranks_well(faults.ends_early, 2, transport)


@pytest.mark.parametrize("transport", OWN)
def test_no_hops_in_graphs(transport):
    for text in run_ranks_well(faults.captured, 2, transport):
        assert text.startswith("ring_attention: a CUDA graph is being captured")


@pytest.mark.parametrize("transport", OWN)
def test_two_communicators_in_another_order(transport):
    for seconds, errors in run_ranks_well(faults.other_order, 2, transport, TIMEOUT):
        assert seconds < 2 * TIMEOUT + 2 * GRACE
        assert errors and all("late, gone, or" in text for text in errors)


@pytest.mark.parametrize("transport", OWN)
def test_another_length(transport):
    found = run_ranks_well(faults.other_length, 2, transport, TIMEOUT)
    for rank, (message, error) in enumerate(found):
        assert "different arguments" in message and "rank 1: " in message
        check_ring_error(error, rank, ("agreement", *PHASES))
