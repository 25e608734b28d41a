"""Heads and batches of a ring's forward that begin, and what the others do meanwhile."""

import pytest
import torch
from cp_plans import LAYOUTS
from helpers import assert_fp64_equal, random_tensor, run

import lctx_kernels as lk
from lctx_kernels import cp, reference
from lctx_kernels.cp import parts, steps
from lctx_kernels.cp.keys import Rank
from lctx_kernels.cp.parts import parts_of
from lctx_kernels.cp.schedule import schedule_of
from lctx_kernels.cp.transport import Simulator


def split(plan, rank, Hq=16, Hkv=16, B=1, causal=True, window=0):
    """Per part whether own keys are last, and how many batches and key heads it has.

    "two" in place of whether: its own and first foreign keys are taken together.
    """
    at = Rank(rank, schedule_of(plan, causal, window), Simulator(plan.world_size).rank(rank), 1.0)
    sizes = ((B, plan.lengths[rank], heads, 128) for heads in (Hq, Hkv, Hkv))
    q, k, v = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    found = parts_of(at, q, k, v)
    assert sum(part.queries(q).numel() for part in found) == q.numel()
    assert all(part.queries(q).shape[2] == part.keys(k).shape[2] * Hq // Hkv for part in found)
    return [("two" if part.two else part.own_last, *part.keys(k).shape[::2]) for part in found]


def test_two_steps_together():
    """The others begin: as many as last as long as the hop, a quarter at least."""
    plan = cp.make_plan(16384, 2)
    assert split(plan, 0) == [("two", 1, 7), (False, 1, 9)]  # twice as many keys come to rank 0
    assert split(plan, 1) == [("two", 1, 11), (False, 1, 5)]
    assert split(plan, 0, 32, 8) == split(plan, 1, 32, 8) == [("two", 1, 6), (False, 1, 2)]
    assert split(plan, 1, 32, 8, causal=False) == [("two", 1, 6), (False, 1, 2)]
    assert split(plan, 1, B=4) == [("two", 3, 16), (False, 1, 16)]
    assert split(cp.make_plan(8 * 8192, 8), 3) == [("two", 1, 7), (False, 1, 9)]
    assert split(cp.make_plan(1024, 2), 0, 32, 8) == [(False, 1, 8)]  # the hop takes longer
    assert split(plan, 0, 4, 1) == [(False, 1, 1)]


@pytest.mark.parametrize("heads", [(16, 16), (32, 8)])
def test_long_own_keys_come_last(heads):
    half = heads[1] // 2
    for T in (18 * 1024, 20 * 1024, 65536):
        for rank in (0, 1):
            last = [(False, 1, half), (True, 1, half)]
            assert split(cp.make_plan(T, 2), rank, *heads) == last
    both = split(cp.make_plan(18 * 1024, 2), 0, *heads, causal=False)
    assert [way for way, *_ in both] == ["two", False]  # no triangle that could come last


def test_how_many(monkeypatch):
    assert split(cp.make_plan(65536, 2), 0) == [(False, 1, 8), (True, 1, 8)]
    monkeypatch.setattr(parts, "two_steps", lambda *_: None)
    monkeypatch.setattr(parts, "WORTH_SECONDS", 0.0)
    plan = cp.make_plan(16384, 2)
    assert split(plan, 0) == [(False, 1, 9), (True, 1, 7)]  # twice as many keys come to rank 0
    assert split(plan, 1) == [(False, 1, 8), (True, 1, 8)]
    assert split(plan, 0, 32, 8) == [(False, 1, 4), (True, 1, 4)]
    assert split(plan, 1, 6, 3) == [(False, 1, 2), (True, 1, 1)]
    assert split(plan, 1, B=3) == [(False, 2, 16), (True, 1, 16)]


def test_one_part():
    """Where own keys are short, no triangle, or few heads."""
    assert split(cp.make_plan(16384, 2, layout="striped"), 0) == [(False, 1, 16)]
    assert split(cp.make_plan(2**18, 2), 0) == [(False, 1, 8), (True, 1, 8)]
    plan = cp.make_plan(65536, 2)
    assert split(plan, 0, 4, 1) == [(False, 1, 1)]
    assert split(plan, 0, causal=False) == split(plan, 0, window=999) == [(False, 1, 16)]
    packed = cp.make_plan(65536, 2, cu_seqlens=torch.tensor([0, 32768, 65536], dtype=torch.int32))
    assert split(packed, 0) == [(False, 1, 16)]
    assert split(cp.make_plan(65536, 1), 0) == [(False, 1, 16)]


def test_where_own_keys_do_not_last_as_long_as_the_hop(monkeypatch):
    monkeypatch.setattr(parts, "two_steps", lambda *_: None)
    monkeypatch.setattr(parts, "WORTH_SECONDS", 0.0)
    assert split(cp.make_plan(4096, 2), 0) == [(False, 1, 16)]


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_attention_over_the_whole_sequence(layout, n, monkeypatch):
    monkeypatch.setattr(parts, "hop_seconds", lambda *_: 0.0)
    monkeypatch.setattr(parts, "WORTH_SECONDS", 0.0)
    made = []

    def counted(*arguments):
        made.append(len(parts_of(*arguments)))
        return parts_of(*arguments)

    monkeypatch.setattr(steps, "parts_of", counted)
    for T, B, heads in ((61, 1, 3), (64, 1, 2), (61, 3, 1), (64, 2, 2), (61, 1, 1), (n - 1, 1, 2)):
        plan = cp.make_plan(T, n, layout=layout)
        x = {
            name: random_tensor(B, T, H, 6, seed=i)
            for i, (name, H) in enumerate((("q", 2 * heads), ("k", heads), ("v", heads)))
        }
        grads = {
            "out": random_tensor(B, T, 2 * heads, 6, seed=8),
            "lse": random_tensor(B, 2 * heads, T, seed=9),
        }

        def ring(q, k, v, plan=plan):
            shards = (cp.shard(plan, t, 1, None) for t in (q, k, v))
            out, lse = lk.ring_attention(*shards, plan=plan, transport="sim", return_lse=True)
            return {"out": cp.unshard(plan, out, 1, "sim"), "lse": cp.unshard(plan, lse, 2, "sim")}

        def exact(q, k, v):
            return dict(zip(("out", "lse"), reference.flash_attention(q, k, v), strict=True))

        found, expected = run(ring, x, grads), run(exact, x, grads)
        for name in expected:
            assert_fp64_equal(name, found[name], expected[name])
    assert set(made) == {1, 2}
