"""What becomes of a ring when a rank is gone, late, or does something else."""

import copy
import re
import threading
import time

import cp_method_workers as methods
import cp_workers
import pytest
import torch.distributed as dist
from processes import run_ranks, run_ranks_well

from lctx_kernels import cp
from lctx_kernels.cp.process_group import GroupTransport
from lctx_kernels.cp.rendezvous import AbsentError, Rendezvous
from lctx_kernels.cp.transport import run_alone

pytestmark = pytest.mark.dist

TIMEOUT = 2.0
GRACE = 5.0


def check_ring_error(outcome, rank):
    assert outcome.error == "RingError", outcome.text
    (waited,) = re.findall(r"waited ([0-9.]+) s", outcome.text)
    assert float(waited) < TIMEOUT + GRACE  # processes may take long to start on a busy machine
    assert outcome.fields["rank"] == rank
    assert outcome.fields["phase"] in ("agreement", "forward kv", "backward kv", "backward dkv")
    assert f"rank {rank} of 4 waited" in outcome.text and "is late, gone, or" in outcome.text


@pytest.mark.parametrize(
    "victim, phase, step",
    [(2, "forward kv", 1), (0, "backward kv", 0), (3, "backward dkv", 2)],
)
def test_a_killed_rank(victim, phase, step):
    outcomes = run_ranks(cp_workers.killed, 4, victim, phase, step, TIMEOUT)
    assert outcomes[victim].error == "died"
    named = set()
    for rank in {0, 1, 2, 3} - {victim}:
        check_ring_error(outcomes[rank], rank)
        fields = outcomes[rank].fields
        assert fields["step"] >= 0 and fields["bytes"] > 0
        named |= set(fields["peers"])
    assert victim in named
    others = [outcomes[r].text for r in range(4) if r != victim]
    assert any(f"rank {victim}: says nothing: still at work, or gone" in text for text in others)


def test_a_delayed_rank_and_a_new_group():
    outcomes = run_ranks(cp_workers.delayed, 4, 1, "forward kv", 1, TIMEOUT)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, outcome.text
        text, last_hop = outcome.value
        assert f"rank {rank} of 4 waited" in text and "step" in text
        assert last_hop["error"] is None and last_hop["done"]
        (waited,) = re.findall(r"waited ([0-9.]+) s", text)
        assert float(waited) < TIMEOUT + GRACE


def test_a_rank_that_does_not_call():
    outcomes = run_ranks(cp_workers.absent, 4, 3, TIMEOUT)
    for rank in range(3):
        check_ring_error(outcomes[rank], rank)
        assert outcomes[rank].fields["phase"] == "agreement"


@pytest.mark.parametrize(
    "call, texts",
    [
        (cp_workers.other_length, ("different arguments", "rank 1: sequence length = 27")),
        (cp_workers.not_the_plans_length, ("q has 9 rows on rank 1; expected 10",)),
        (cp_workers.other_window, ("different arguments", "rank 0: window = 4", "window = 5")),
        (cp_workers.refused_at_length, ("layout is ",)),
        (cp_workers.refused_infini, ("segment_len is 0",)),
        (cp_workers.refused_landmark, ("block_size is 1",)),
        (cp_workers.refused_dilated, ("segment_lengths",)),
        (cp_workers.group_for_other_devices, ("the group cannot move cpu tensors",)),
        (cp_workers.unshard_by_another_plan, ("cp.unshard", "rank 1: layout = striped")),
        (cp_workers.unshard_of_another_dtype, ("cp.unshard", "rank 1: dtype = float64")),
        (cp_workers.unshard_of_another_batch, ("cp.unshard", "rank 1: other dims = [2]")),
        (cp_workers.unshard_of_another_length, ("cp.unshard", "5 at dim = 1; expected 4")),
        (cp_workers.roll_by_another_shift, ("cp.roll", "rank 1: shifts = 2")),
        (methods.another_first, ("infini_attention", "rank 1: first = bypass")),
        (methods.another_block_size, ("landmark_attention", "rank 1: block_size = 8")),
        (methods.another_number_of_rows, ("q has 7 rows on rank 1; expected 8",)),
        (methods.another_mix_grad, ("dilated_attention", "rank 1: mix_grad = detached")),
        (methods.decode_of_other_keys, ("k.shape[3] is 4 but q.shape[3] is 8",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_arguments_are_one_error_on_every_rank(call, texts):
    for outcome in run_ranks(call, 3, 1):
        assert outcome.error == "ValueError", outcome.text
        assert all(text in outcome.text for text in texts), outcome.text
        assert outcome.seconds < 10 * GRACE  # not the timeout of the group, half an hour


@pytest.mark.parametrize("call", [methods.decode_of_no_queries, methods.ring_of_no_queries])
def test_what_is_no_tensor_is_refused_on_every_rank(call):
    for rank, outcome in enumerate(run_ranks(call, 3, 1)):
        assert outcome.error == ("TypeError" if rank == 1 else "ValueError"), outcome.text
        assert "q is None; expected a torch.Tensor" in outcome.text
        assert outcome.seconds < 10 * GRACE


def test_an_error_of_the_only_caller_is_its_own():
    first, second = run_ranks(cp_workers.refused_alone, 2, 1)
    assert first.error is None
    assert second.error == "ValueError" and "window is 0" in second.text


def test_backwards_in_another_order():
    for rank, outcome in enumerate(run_ranks(cp_workers.other_order, 4, 2, TIMEOUT)):
        check_ring_error(outcome, rank)
        assert outcome.fields["phase"].startswith("backward")


@pytest.mark.parametrize(
    "phase, step", [("forward kv", 0), ("backward kv", 1), ("backward dkv", 2)]
)
def test_a_rank_that_stops_in_the_middle(phase, step):
    outcomes = run_ranks(cp_workers.stopped, 4, 1, phase, step, TIMEOUT)
    for rank in (0, 2, 3):
        check_ring_error(outcomes[rank], rank)
    texts = [outcomes[rank].text for rank in (0, 2, 3)]
    assert any("rank 1: gave up in call" in text for text in texts), texts
    assert outcomes[1].value == [
        "MemoryError: no memory for this hop",
        "RingError: rank 1: this group was given up: MemoryError in the middle of it: no memory "
        "for this hop; make another by torch.distributed.new_group",
    ]


def test_a_transport_that_was_not_made():
    run_ranks_well(cp_workers.made_again, 2)


class Members:
    """A group, of which only the store is asked."""

    def __init__(self):
        self.store = dist.HashStore()

    def get_group_store(self):
        return self.store


def test_ranks_meet_again_after_a_first_attempt():
    """What was said in one attempt to make a transport is not heard in the next."""
    group, heard = Members(), {}

    def rank(own, meeting, attempt):
        values = [meeting.exchange(f"{what} {attempt} {own}".encode(), 5.0) for what in "ab"]
        heard[attempt, own] = [b"-".join(v).decode() for v in values]

    for attempt in (1, 2):
        shared = Rendezvous(group, "p2p", 0, 2)
        other = copy.copy(shared)  # of the other process, which counts attempts for itself
        other.rank = 1
        threads = [
            threading.Thread(target=rank, args=(own, meeting, attempt))
            for own, meeting in enumerate((shared, other))
        ]
        for own, thread in enumerate(threads):
            time.sleep(0.3 * own)
            thread.start()
        for thread in threads:
            thread.join()
    for attempt in (1, 2):
        said = [f"{what} {attempt} 0-{what} {attempt} 1" for what in "ab"]
        assert heard[attempt, 0] == heard[attempt, 1] == said
    with pytest.raises(AbsentError) as late:
        Rendezvous(group, "nccl", 0, 2).exchange(b"", 0.2)
    assert late.value.peer == 1


def test_a_failed_wait_ends_the_steps():
    """The streams that a step is on are left with the exception, not when it is forgotten."""
    left = []

    def steps():
        try:
            yield "ticket"
        finally:
            left.append(True)

    class Late(GroupTransport):
        def __init__(self):
            self.broken = "late"

        def wait(self, ticket):
            raise cp.RingError("late", rank=0, step=0, phase="forward kv", peers=(1,), bytes=0)

    with pytest.raises(cp.RingError) as kept:
        run_alone(steps(), Late())
    assert left and kept.value.peers == (1,)
