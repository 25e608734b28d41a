"""The first two steps of a forward together, and own keys that come first in a backward."""

import pytest
import torch

from lctx_kernels import cp
from lctx_kernels.cp import together
from lctx_kernels.cp.keys import Rank
from lctx_kernels.cp.schedule import Call, schedule_of
from lctx_kernels.cp.together import own_calls, two_steps
from lctx_kernels.cp.transport import Simulator


def rank_of(plan, rank, causal=True, window=0):
    schedule = schedule_of(plan, causal, window)
    return Rank(rank, schedule, Simulator(plan.world_size).rank(rank), 1.0)


def tensors(plan, rank, Hq=32, Hkv=8):
    sizes = ((1, plan.lengths[rank], heads, 128) for heads in (Hq, Hkv, Hkv))
    return [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes]


@pytest.fixture
def wherever_it_can(monkeypatch):
    """The first two steps go together however little that saves."""
    monkeypatch.setattr(together, "WORTH", 0.0)


@pytest.mark.usefixtures("wherever_it_can")
@pytest.mark.parametrize("heads", [(32, 8), (16, 16)])
def test_zigzag_on_two_ranks(heads):
    plan = cp.make_plan(16384, 2)
    for rank in (0, 1):
        two = two_steps(rank_of(plan, rank), *tensors(plan, rank, *heads))
        assert two.own[:5] == (0, 8192, 0, 8192, True)
        assert two.far[:4] == ((4096, 8192, 0, 8192) if rank == 0 else (0, 8192, 0, 4096))
        assert two.final == 8192


@pytest.mark.parametrize("heads", [(32, 8), (16, 16)])
def test_what_is_faster_step_by_step(heads):
    """Where what is carried takes little of a step."""
    for T, together_ in ((16384, True), (65536, False)):
        plan = cp.make_plan(T, 2)
        found = [two_steps(rank_of(plan, r), *tensors(plan, r, *heads)) for r in (0, 1)]
        assert all((two is not None) == together_ for two in found)


@pytest.mark.usefixtures("wherever_it_can")
@pytest.mark.parametrize("n", [3, 4, 8])
def test_rows_that_no_later_step_has_are_done(n):
    plan = cp.make_plan(n * 8192, n)
    for rank in range(n):
        at = rank_of(plan, rank)
        two = two_steps(at, *tensors(plan, rank))
        later = range(2, n)
        rows = torch.zeros(8192, dtype=torch.bool)
        for step in later:
            for call in at.schedule.calls[rank][at.schedule.source(rank, step)]:
                rows[call.q0 : call.q1] = True
        assert not rows[: two.final].any() and rows[two.final :].all()


def test_what_does_not_go_together():
    zigzag, striped = cp.make_plan(32768, 4), cp.make_plan(32768, 4, layout="striped")
    assert two_steps(rank_of(zigzag, 1), *tensors(zigzag, 1)) is not None
    assert two_steps(rank_of(zigzag, 1, False), *tensors(zigzag, 1)) is not None
    assert two_steps(rank_of(zigzag, 1, True, 999), *tensors(zigzag, 1)) is None
    assert two_steps(rank_of(striped, 1), *tensors(striped, 1)) is None
    packed = cp.make_plan(32768, 4, cu_seqlens=torch.tensor([0, 15000, 32768], dtype=torch.int32))
    assert two_steps(rank_of(packed, 1), *tensors(packed, 1)) is None
    alone = cp.make_plan(16384, 1)
    assert two_steps(rank_of(alone, 0), *tensors(alone, 0)) is None
    short = cp.make_plan(1024, 2)
    on_cpu = [x.new_empty(x.shape, device="cpu") for x in tensors(short, 0)]
    assert two_steps(rank_of(short, 0), *on_cpu) is None


@pytest.mark.parametrize("T, fewest, most", [(16384, 128, 4096), (512, 128, 128)])
def test_own_keys_whose_gradients_come_first(T, fewest, most):
    plan = cp.make_plan(T, 2)
    (tip,), (rest,) = own_calls(rank_of(plan, 0), *tensors(plan, 0, 16, 16))
    assert tip[:2] == tip[2:4] and tip.q1 == T // 2 and fewest <= tip.q1 - tip.q0 <= most
    assert rest[:4] == (0, T // 2, 0, tip.k0) and tip.causal and rest.causal
    assert tip.pairs + rest.pairs == Call(0, T // 2, 0, T // 2, True).pairs


@pytest.mark.parametrize("rank", [0, 1])
def test_half_of_the_own_keys_come_first(rank):
    """Where the hop is long, or longer than all of them; few of them do where it is short."""
    for T, heads in ((16384, 16), (12288, 16), (1024, 1)):
        plan = cp.make_plan(T, 2)
        (tip,), (rest,) = own_calls(rank_of(plan, rank), *tensors(plan, rank, heads, heads))
        assert tip[:4] == (T // 4, T // 2, T // 4, T // 2) and rest[:4] == (0, T // 2, 0, T // 4)
    plan = cp.make_plan(65536, 2)
    early, _ = own_calls(rank_of(plan, rank), *tensors(plan, rank, 16, 16))
    assert all(call.q1 - call.q0 < 8192 for call in early) and len(early) == (rank == 0)
    plan = cp.make_plan(8192, 2)  # 512 tiles
    assert own_calls(rank_of(plan, rank), *tensors(plan, rank, 16, 16))[0] == []


def test_own_keys_that_all_come_last():
    for plan, options in (
        (cp.make_plan(16384, 1), ()),
        (cp.make_plan(128, 2), ()),  # less than two tiles
        (cp.make_plan(16384, 2), ()),  # few, of 4 query heads each
        (cp.make_plan(16384, 2), (False,)),
        (cp.make_plan(16384, 2), (True, 500)),
    ):
        at = rank_of(plan, 0, *options)
        assert own_calls(at, *tensors(plan, 0)) == ([], list(at.schedule.calls[0][0]))
