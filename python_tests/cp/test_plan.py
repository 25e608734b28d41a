"""Plans: every position on one rank, every visible pair computed once, nothing else sent."""

import itertools
import pickle

import pytest
import torch
from cp_plans import LAYOUTS, int32, masks, plans, positions_of, visible
from hypothesis import given, settings

from lctx_kernels import cp
from lctx_kernels.cp.schedule import schedule_of


def count_matrix(plan, causal, window):
    """How often each (query position, key position) is computed, by the calls of all ranks.

    Keys of other ranks are counted through the rows that travel.
    """
    schedule, held = schedule_of(plan, causal, window), positions_of(plan)
    count = torch.zeros(plan.seq_len, plan.seq_len, dtype=torch.int64)
    for rank in range(plan.world_size):
        for source in range(plan.world_size):
            calls, keys = schedule.calls[rank][source], held[source]
            if rank != source:
                calls = schedule.wire_calls(rank, source)
                keys = [keys[j] for begin, end in schedule.wire[source] for j in range(begin, end)]
                assert len(keys) == schedule.wire_rows(source)
            for call in calls:
                add(count, call, held[rank], keys)
    return count


def add(count, call, queries, keys):
    i = torch.arange(call.q1 - call.q0)[:, None]
    j = torch.arange(call.k1 - call.k0) + call.start
    seen = torch.ones(len(i), len(j), dtype=torch.bool)
    if call.causal:
        seen &= i >= j
    if call.window:
        seen &= (i - j).abs() < call.window
    assert seen.sum() == call.pairs > 0
    rows, columns = torch.tensor(queries[call.q0 : call.q1]), torch.tensor(keys[call.k0 : call.k1])
    count[rows[:, None], columns] += seen


def check_final_rows(plan, causal, window):
    """Every row is done once: after the last call that has it, or in the end."""
    schedule = schedule_of(plan, causal, window)
    n = plan.world_size
    orders = (list(range(n)), [*range(1, n), 0])  # own keys first, or last
    for (rank, length), order in itertools.product(enumerate(plan.lengths), orders):
        counts, left_over = schedule.final_rows(rank, order[-1] == 0 and n > 1)
        done = torch.zeros(length, dtype=torch.int64)
        for step in order:
            calls = schedule.calls[rank][schedule.source(rank, step)]
            for call, count in zip(calls, counts[step], strict=True):
                assert (done[call.q0 : call.q1] == 0).all()  # not touched any more
                done[call.q0 : call.q0 + count] += 1
        for begin, end in left_over:
            done[begin:end] += 1
        assert (done == 1).all()


def check(plan, causal, window):
    seen = visible(plan, causal, window)
    assert torch.equal(count_matrix(plan, causal, window), seen.long())
    check_final_rows(plan, causal, window)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", range(1, 9))
def test_each_visible_pair_is_computed_once(n, layout):
    for T in (0, 1, 2, 3, n - 1, n, n + 1, 2 * n - 1, 2 * n, 2 * n + 1, 31, 64):
        for causal in (True, False):
            for window in (0, 1, 4, 13, 63):
                check(cp.make_plan(T, n, layout=layout), causal, window)


@settings(max_examples=200)
@given(plan=plans(), mask=masks)
def test_any_plan_and_mask(plan, mask):
    check(plan, *mask)


@settings(max_examples=100)
@given(plan=plans(), mask=masks)
def test_no_row_and_no_hop_without_need(plan, mask):
    schedule, seen = schedule_of(plan, *mask), visible(plan, *mask)
    held = positions_of(plan)
    for source in range(plan.world_size):
        needs = [0] * plan.world_size
        rows = set()
        for step in range(1, plan.world_size):
            rank = (source + step) % plan.world_size
            used = seen[held[rank]][:, held[source]].any(0)
            needs[step] = int(used.any())
            rows |= set(used.nonzero().flatten().tolist())
        steps = [step for step, need in enumerate(needs) if need]
        assert (schedule.first[source], schedule.last[source]) == (
            (steps[0], steps[-1]) if steps else (0, 0)
        )
        wire = {r for begin, end in schedule.wire[source] for r in range(begin, end)}
        assert wire == rows


@given(plan=plans(max_len=40))
def test_shard_and_unshard(plan):
    x = torch.randn(2, plan.seq_len, 3)
    parts = [cp.shard(plan, x, 1, rank) for rank in range(plan.world_size)]
    for rank, part in enumerate(parts):
        positions = cp.shard_positions(plan, rank)
        assert positions.tolist() == positions_of(plan)[rank]
        assert plan.lengths[rank] == len(positions)
        assert torch.equal(part, x[:, positions])
    everything = cp.shard(plan, x, -2, None)
    assert torch.equal(everything, torch.cat(parts, 1))
    assert torch.equal(cp.unshard(plan, everything, 1, "sim"), x)


@given(plan=plans(max_len=40))
def test_roll(plan):
    x = torch.randn(plan.seq_len, 2)
    local = cp.shard(plan, x, 0, None)
    for shifts in (0, 1, -1, 3, -100):
        rolled = cp.roll(plan, local, shifts, 0, "sim")
        assert torch.equal(cp.unshard(plan, rolled, 0, "sim"), x.roll(shifts, 0))


@given(plan=plans())
def test_plans_are_values(plan):
    assert pickle.loads(pickle.dumps(plan)) is plan
    again = cp.make_plan(
        plan.seq_len, plan.world_size, cu_seqlens=int32(plan.documents),
        positions=[cp.shard_positions(plan, rank) for rank in range(plan.world_size)],
    )  # fmt: skip
    assert positions_of(again) == positions_of(plan) and again.documents == plan.documents


def test_gradients():
    plan = cp.make_plan(7, 3, positions=[torch.tensor([6, 0]), torch.tensor([], dtype=torch.long),
                                         torch.tensor([5, 1, 2, 4, 3])])  # fmt: skip
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x):
        local = cp.shard(plan, x, 0, None)
        rolled = cp.roll(plan, local.sin(), 2, 0, "sim")
        return cp.unshard(plan, rolled, 0, "sim"), cp.shard(plan, x, 0, 2)

    assert torch.autograd.gradcheck(there_and_back, x)


def test_layouts():
    """The layouts of the papers, word for word."""
    zigzag = positions_of(cp.make_plan(12, 3))
    assert zigzag == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    packed = positions_of(cp.make_plan(12, 2, cu_seqlens=int32([0, 8, 12])))
    assert packed == [[0, 1, 6, 7, 9, 10], [2, 3, 4, 5, 8, 11]]
    assert positions_of(cp.make_plan(7, 3, layout="striped")) == [[0, 3, 6], [1, 4], [2, 5]]
    assert positions_of(cp.make_plan(7, 3, layout="contiguous")) == [[0, 1], [2, 3], [4, 5, 6]]


@pytest.mark.parametrize("n", [2, 3, 8])
def test_zigzag_cuts_every_document(n):
    """Packed documents are as balanced as one long one, short ones fall to all ranks in turn."""
    bounds = [0, 48 * n, 50 * n, 80 * n]
    schedule = schedule_of(cp.make_plan(80 * n, n, cu_seqlens=int32(bounds)), True, 0)
    work = [sum(schedule.pairs(r, s) for s in range(n)) for r in range(n)]
    assert len(set(work)) == 1
    short = cp.make_plan(60 * n, n, cu_seqlens=int32(range(60 * n + 1)))
    assert set(short.lengths) == {60}


@pytest.mark.parametrize("n", [2, 4, 8])
def test_zigzag_is_balanced_in_every_step(n):
    schedule = schedule_of(cp.make_plan(16 * n, n), True, 0)
    for step in range(1, n):
        pairs = {schedule.pairs(rank, schedule.source(rank, step)) for rank in range(n)}
        assert len(pairs) == 1
        assert all(len(schedule.calls[r][schedule.source(r, step)]) == 1 for r in range(n))
    assert all(len(schedule.calls[rank][rank]) == 1 for rank in range(n))


def test_a_window_ends_the_ring_early():
    """Keys travel as far as the window reaches, and only the rows that it covers."""
    plan = cp.make_plan(8192, 8, layout="contiguous")
    for window, hops, rows in ((1, 0, 0), (100, 1, 99), (1025, 1, 1024), (1026, 2, 1024)):
        schedule = schedule_of(plan, True, window)
        assert set(schedule.last[:-2]) == {hops} and set(map(schedule.wire_rows, range(6))) == {
            rows
        }
        assert schedule.last[7] == 0  # nobody comes after the last rank
    zigzag = schedule_of(cp.make_plan(8192, 8), True, 0)
    assert zigzag.wire_rows(0) == 512  # the last quarter of rank 0 is seen by itself alone


def test_documents_in_one_rank_send_nothing():
    plan = cp.make_plan(64, 4, layout="contiguous", cu_seqlens=int32([0, 16, 20, 32, 48, 64]))
    schedule = schedule_of(plan, True, 0)
    assert set(schedule.last) == {0} and [len(schedule.calls[r][r]) for r in range(4)] == [
        1,
        2,
        1,
        1,
    ]


def test_shift_labels():
    labels = torch.arange(1, 8)[None].repeat(2, 1)
    assert cp.shift_labels(labels)[0].tolist() == [2, 3, 4, 5, 6, 7, -100]
    packed = cp.shift_labels(labels, cu_seqlens=int32([0, 0, 3, 7]), ignore_index=-1)
    assert packed[1].tolist() == [2, 3, -1, 5, 6, 7, -1]
    assert cp.shift_labels(labels.T, dim=0)[:, 0].tolist() == [2, 3, 4, 5, 6, 7, -100]


def test_labels_stay_beside_their_tokens():
    """Shift, then shard: row r of any rank is compared with the token after it."""
    plan, tokens = cp.make_plan(20, 4), torch.arange(100, 120)[None]
    labels = cp.shift_labels(tokens)
    for rank in range(4):
        mine, wanted = cp.shard(plan, tokens, 1, rank)[0], cp.shard(plan, labels, 1, rank)[0]
        assert all(w in (t + 1, -100) for t, w in zip(mine, wanted, strict=True))


def test_forecast():
    shape = {"query_heads": 32, "key_heads": 8, "head_dim": 128}
    zigzag = cp.forecast(cp.make_plan(65536, 8), **shape)
    assert zigzag.pairs == 65536 * 65537 // 2 and zigzag.balance > 0.999
    L, bytes_a_row = 8192, 2 * 8 * 128 * 2
    assert zigzag.forward.bytes == 7 * L * bytes_a_row
    assert zigzag.forward.efficiency > 0.999 and "needs 37.8 GB/s" in str(zigzag)
    contiguous = cp.forecast(cp.make_plan(65536, 8, layout="contiguous"), **shape)
    assert contiguous.forward.efficiency == pytest.approx(8 / 15, rel=0.01)
    slow = cp.forecast(cp.make_plan(65536, 8), **shape, link=10e9)
    assert slow.forward.efficiency < 0.4
    assert cp.forecast(cp.make_plan(0, 3), **shape).forward.efficiency == 1.0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((-1, 2), ValueError, "seq_len is -1; expected an int >= 0; nearest is 0"),
        ((4, 0), ValueError, "world_size is 0"),
        ((4.0, 1), TypeError, "seq_len is 4.0"),
        ((4, 2, {"layout": "ring"}), ValueError, "layout is 'ring'; expected one of zigzag, "),
        ((4, 2, {"cu_seqlens": int32([0, 3])}), ValueError, "starts of documents from 0"),
        ((4, 2, {"cu_seqlens": torch.tensor([0, 4])}), TypeError, "expected an int32 tensor"),
        ((4, 2, {"positions": [torch.tensor([0, 1])]}), ValueError, "positions has 1 entries"),
        ((3, 1, {"positions": [torch.tensor([0, 1, 1])]}), ValueError, "each of 0 ... 2 once"),
        ((2, 1, {"positions": [torch.tensor([0.0, 1.0])]}), TypeError, r"positions\[0\] holds 0.0"),
        ((2, 1, {"positions": [[[0, 1]]]}), TypeError, r"positions\[0\] holds \[0, 1\]"),
        ((2, 1, {"positions": [0, 1]}), TypeError, r"positions\[0\] is 0; expected one entry a"),
        ((2, 1, {"positions": 2}), TypeError, "positions is a int; expected one entry a rank"),
        ((2**63, 1), ValueError, "seq_len is 9223372036854775808; expected an int of at most"),
    ],
)
def test_bad_plans_are_refused(arguments, error, message):
    *sizes, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        cp.make_plan(*sizes, **options)


def test_bad_parts_are_refused():
    plan = cp.make_plan(8, 2)
    with pytest.raises(ValueError, match=r"rank is 2; expected 0 \.\.\. 1"):
        cp.shard(plan, torch.zeros(8), 0, 2)
    with pytest.raises(ValueError, match="expected 8 there, the plan's whole sequence"):
        cp.shard(plan, torch.zeros(9), 0, 1)
    with pytest.raises(ValueError, match="group is None and there is no default process group"):
        cp.unshard(plan, torch.zeros(4), 0, None)
    with pytest.raises(TypeError, match="group is 5; expected a ProcessGroup"):
        cp.roll(plan, torch.zeros(4), 1, 0, 5)
