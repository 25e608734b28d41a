"""ring_attention over 2 and 4 processes with gloo: the bits of the simulation, real groups."""

import cp_method_workers as methods
import cp_workers
import pytest
from processes import run_ranks_well

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("n", [2, 4])
def test_many_cases(n):
    hops = run_ranks_well(cp_workers.many_cases, n)
    assert all(count > 0 for count in hops)


@pytest.mark.parametrize(
    "n, check",
    [
        (2, cp_workers.equal_lengths_need_no_plan),
        (3, cp_workers.moving_tokens),
        (2, cp_workers.backward_of_one_rank),
        (4, cp_workers.groups_and_meshes),
        (2, cp_workers.destroyed_groups),
        (2, cp_workers.checkpoint_and_compile),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_ranks(n, check):
    run_ranks_well(check, n)


METHODS = (
    methods.infini_cases,
    methods.dilated_cases,
    methods.landmark_cases,
    methods.decode_cases,
)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("check", METHODS, ids=lambda check: check.__name__)
def test_other_methods_over_ranks(check, n):
    run_ranks_well(check, n)


def test_compiled_methods_over_ranks():
    run_ranks_well(methods.infini_compiled, 2)


def test_hop_log(tmp_path):
    logs = run_ranks_well(cp_workers.log_to_file, 4, str(tmp_path))
    for rank, log in enumerate(logs):
        assert log["rank"] == rank and log["world_size"] == 4
        phases = [hop["phase"] for hop in log["hops"]]
        assert phases.count("forward kv") == phases.count("backward kv") == 3
        assert phases.count("backward dkv") == 2 * 3  # two groups of heads
        assert all(hop["posted"] <= hop["done"] and hop["error"] is None for hop in log["hops"])
        sent = [hop["bytes_sent"] for hop in log["hops"] if hop["phase"] == "forward kv"]
        rows = 2 * 2 * 8 * 8  # k and v, heads, head dimension, bytes
        first = 2 if rank == 0 else 5  # the high chunk of rank 0 is seen by itself alone
        assert sent[0] == first * rows
