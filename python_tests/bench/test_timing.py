import time

import pytest
import torch

from bench.timing import QUICK, Budget, Timing, describe_error, time_round_robin


def test_every_round_times_every_candidate_once_starting_one_further_on():
    calls = []
    budget = Budget(seconds=0.0, min_rounds=3, max_rounds=3, sample_seconds=1e-9)
    candidates = {name: lambda name=name: (calls.append(name), time.sleep(2e-3)) for name in "abc"}

    timings = time_round_robin(candidates, budget=budget)

    blocks = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert blocks == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_time_of_a_known_sleep():
    timing = time_round_robin({"sleep": lambda: time.sleep(5e-3)}, budget=QUICK)["sleep"]
    assert 5e-3 <= timing.median < 5e-2


def test_a_failing_candidate_is_dropped_and_the_others_go_on():
    def fail():
        raise RuntimeError("first line\nsecond line")

    timings = time_round_robin({"bad": fail, "good": lambda: None}, budget=QUICK)

    assert timings["bad"].error == "RuntimeError: first line"
    assert timings["bad"].samples == []
    assert timings["good"].error is None
    assert timings["good"].median > 0


def test_median_and_quartiles():
    timing = Timing([5.0, 1.0, 3.0, 2.0, 4.0])
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert Timing([2.0]).quartiles == (2.0, 2.0)


@pytest.mark.parametrize(
    ("round_seconds", "rounds"), [(0.001, 15), (2.0, 5), (100.0, 3), (0.0, 15)]
)
def test_rounds_fill_the_budget_within_bounds(round_seconds, rounds):
    assert Budget(seconds=10.0).rounds(round_seconds) == rounds


def test_errors_are_one_line():
    assert describe_error(KeyError()) == "KeyError"
    refusal = NotImplementedError("flash_attention cannot run:\n  no kernel for cuda\nnearest: cpu")
    assert describe_error(refusal) == (
        "NotImplementedError: flash_attention cannot run: no kernel for cuda"
    )


def test_timing_keeps_the_thread_count():
    threads = torch.get_num_threads()
    time_round_robin({"nothing": lambda: None}, budget=QUICK)
    assert torch.get_num_threads() == threads


@pytest.mark.cuda
def test_gpu_samples_are_of_the_call_alone():
    x = torch.zeros(1 << 26, device="cuda")
    timings = time_round_robin({"write": x.zero_, "nothing": lambda: None}, "cuda", QUICK)
    assert timings["nothing"].median < timings["write"].median < 1e-2
