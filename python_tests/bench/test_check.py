import sys
import types
from dataclasses import replace

import pytest
import torch

import lctx_kernels
from bench import candidates, check
from bench.candidates import build, make_inputs
from bench.check import Checker, mask
from bench.hopper import hopper
from bench.registry import OPS, SMALL_BRANCHES, Goal, Group, Shape, op_of
from bench.runner import IsolatedRunner, Runner
from bench.timing import QUICK
from lctx_kernels import reference
from lctx_kernels._measure import peak_extra_bytes, relative_rms, storage_bytes
from lctx_kernels._rowcheck import definition_rows, sample_rows

SHAPE = Shape(T=150, Hq=4, Hkv=2, D=16)
OPTIONS = {
    "flash": [{}, {"scale": 0.3}],
    "landmark": [{"block_size": 16}],
    "infini": [{"segment_len": 32}, {"segment_len": 40, "update": "delta", "first": "bypass"}],
    "dilated": [
        {"segment_lengths": [32, 64, 100], "dilation_rates": [1, 2, 3]},
        {"segment_lengths": [50, 400], "dilation_rates": [2, 4], "head_offset": "block"},
    ],
}


@pytest.mark.parametrize(("op", "options"), [(op, o) for op, all_ in OPTIONS.items() for o in all_])
def test_sampled_rows_are_rows_of_the_definition(op, options):
    q, k, v = make_inputs(SHAPE, "cpu").tensors
    rows = sample_rows(SHAPE.T, count=20)
    q = q.double().requires_grad_()
    full = getattr(reference, f"{op}_attention")(q, k.double(), v.double(), **options)[0][:, rows]
    sampled = definition_rows(op, q, k, v, rows, **options)
    torch.testing.assert_close(sampled, full, rtol=1e-12, atol=1e-12)
    (want,) = torch.autograd.grad(full.square().sum(), q, retain_graph=True)
    (got,) = torch.autograd.grad(sampled.square().sum(), q)
    torch.testing.assert_close(got[:, rows], want[:, rows], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("op", "options"), [(op, o) for op, all_ in OPTIONS.items() for o in all_])
def test_rows_of_some_heads_are_those_of_all(op, options):
    q, k, v = make_inputs(SHAPE, "cpu").tensors
    every = definition_rows(op, q, k, v, [3, 149], **options)
    some = definition_rows(op, q, k, v, [3, 149], [1, 3], **options)
    torch.testing.assert_close(some, every[:, :, [1, 3]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [replace(SHAPE, Tq=9), replace(SHAPE, Tq=9, causal=False)])
def test_rows_of_the_last_queries_and_without_a_mask(shape):
    q, k, v = make_inputs(shape, "cpu").tensors
    full, _ = reference.flash_attention(q.double(), k.double(), v.double(), causal=shape.causal)
    rows = definition_rows("flash", q, k, v, [0, 4, 8], **mask(shape.causal))
    torch.testing.assert_close(rows, full[:, [0, 4, 8]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 1000])
def test_sampled_rows_are_late_rows_and_the_last(length):
    rows = sample_rows(length)
    assert rows == sorted(set(rows))
    assert set(rows) <= set(range(length))
    assert not length or length - 1 in rows
    assert all(row >= min(length // 8, length - 2) for row in rows)


@pytest.mark.parametrize("candidate", ["sdpa", "sdpa-math", "torch-merge", *OPS])
@pytest.mark.parametrize("pass_", ["fwd", "fwd_bwd", "bwd"])
def test_right_candidates_pass(candidate, pass_):
    options = dict(OPS[candidate].small) if candidate in OPS else {}
    inputs = make_inputs(SHAPE, "cpu", "merge" if op_of(candidate) == "merge" else "attention")
    call = build(candidate, inputs, pass_, options, "reference")
    check = Checker("cpu", "reference").check(candidate, SHAPE, pass_, inputs, call, options)
    assert check.failures == []
    assert "small out" in check.errors
    assert len(check.errors) >= (1 if pass_ == "fwd" else 2)


def test_a_fixed_order_of_sums_is_checked_as_any_other():
    group = Group(SHAPE, "bwd", ("sdpa", "flash"), options=(("deterministic", True),))
    _, ours = Runner("cpu", "cpu", check=True, budget=QUICK).run(group)
    assert ours.status == "ok" and ours.options == {"deterministic": True}


@pytest.mark.parametrize("kind", ["sdpa", "flash"])
@pytest.mark.parametrize("shape", [replace(SHAPE, Tq=1), replace(SHAPE, causal=False)])
def test_one_query_and_no_mask(kind, shape):
    runner = Runner("cpu", "reference", check=True, budget=QUICK)
    (row,) = runner.run(Group(shape, "fwd", (kind,)))
    assert row.status == "ok", row.reason


@pytest.mark.parametrize("group", {g.goals[0].label: g for g in hopper()}.values(), ids=str)
def test_every_kind_of_hopper_group_runs_on_the_cpu(group, monkeypatch):
    """At a short length, with PyTorch's default attention in the place of cuDNN's."""
    monkeypatch.setattr(check, "LARGE", 1 << 12)
    monkeypatch.setattr(candidates, "LOCAL_SEGMENT", 128)
    names = [
        name.replace("-cudnn", "")
        for name in group.candidates
        if name not in ("copy", "local-sdpa-cudnn-expanded")
    ]
    shape = replace(group.shape, T=256, B=min(group.shape.B, 2), Hq=4, D=16,
                    Hkv=4 if group.shape.Hq == group.shape.Hkv else 1)  # fmt: skip
    short = replace(group, shape=shape, candidates=tuple(names), goals=())
    rows = Runner("cpu", "cpu", check=True, budget=QUICK).run(short)
    assert [(row.candidate, row.status, row.reason) for row in rows] == [
        (name, "ok", None) for name in names
    ]
    assert dict(group.options).items() <= rows[-1].options.items()
    assert "out" in rows[-1].errors


def test_an_op_that_this_device_lacks_is_a_row_and_not_the_end(monkeypatch):
    def refuse(*args):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(candidates, "_carry_forward", refuse)
    runner = Runner("cpu", "cpu", check=True, budget=QUICK)
    ours, carry = runner.run(Group(SHAPE, "fwd", ("flash", "flash_carry")))
    assert ours.status == "ok"
    assert (carry.status, carry.median_s) == ("unsupported", None)
    assert carry.reason.startswith("NotImplementedError")


def test_rivals_alone_are_not_timed_for_a_goal(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(lctx_kernels, "flash_attention", refuse)
    group = Group(SHAPE, "fwd", ("sdpa", "flash"), (Goal("flash", "sdpa", 1.0),))
    rows = Runner("cpu", "auto", check=True, budget=QUICK).run(group)
    assert [(row.status, row.median_s) for row in rows] == [("unsupported", None)] * 2
    assert "nothing of ours" in rows[0].reason


def test_segments_as_a_batch_are_local_attention():
    inputs = make_inputs(replace(SHAPE, T=4096), "cpu", pass_="fwd")
    q, k, v = inputs.tensors
    want = [
        reference.flash_attention(*(x[:, part] for x in (q, k, v)))[0]
        for part in (slice(0, 2048), slice(2048, 4096))
    ]
    call = build("local-sdpa", inputs, "fwd", {})
    out = call.public(call.run()[0])
    torch.testing.assert_close(out.reshape(q.shape), torch.cat(want, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="no multiple of 2048"):
        build("local-sdpa", make_inputs(replace(SHAPE, T=3000), "cpu"), "fwd", {})


WRONG = {
    "flash": lambda q, k, v, backend: reference.flash_attention(q, k, v, window=100)[0],
    "landmark": lambda q, k, v, backend, block_size: reference.flash_attention(q, k, v)[0],
    "dilated": lambda q, k, v, backend, **o: reference.dilated_attention(
        q, k, v, **o, mix_grad="detached"
    )[0],
    "infini": lambda q, k, v, backend, **o: reference.infini_attention(
        q, k, v, **o, update="delta"
    )[0],
}


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_kernel_is_not_timed(op, monkeypatch):
    monkeypatch.setattr(lctx_kernels, f"{op}_attention", WRONG[op])
    runner = Runner("cpu", "reference", check=True, budget=QUICK)
    shape = Shape(T=400, Hq=4, Hkv=2, D=16)  # delta and linear differ from the third segment on
    sdpa, ours = runner.run(Group(shape, "fwd_bwd", ("sdpa", op)))
    assert sdpa.status == "ok"
    assert ours.status == "check_failed"
    assert ours.median_s is None
    assert "is over" in ours.reason


def test_nan_fails_the_check(monkeypatch):
    monkeypatch.setattr(lctx_kernels, "flash_attention", lambda q, k, v, backend: q * float("nan"))
    (row,) = Runner("cpu", "auto", check=True, budget=QUICK).run(Group(SHAPE, "fwd", ("flash",)))
    assert row.status == "check_failed"


def test_errors_and_refusals_are_told_apart(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no kernel for this device")

    def crash(*args, **kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(lctx_kernels, "flash_attention", refuse)
    monkeypatch.setattr(lctx_kernels, "landmark_attention", crash)
    runner = Runner("cpu", "auto", check=True, budget=QUICK)
    rows = runner.run(Group(SHAPE, "fwd", ("fa4", "sdpa-cudnn", "flash", "landmark", "sdpa")))
    assert [r.status for r in rows] == ["unsupported", "unsupported", "unsupported", "error", "ok"]
    assert rows[2].reason == "NotImplementedError: no kernel for this device"


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_4_gets_the_mask(causal, monkeypatch):
    def stand_in(q, k, v, causal):
        return reference.flash_attention(q, k, v, causal=causal)

    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    group = Group(replace(SHAPE, causal=causal), "fwd", ("fa4", "sdpa"))
    rows = Runner("cpu", "auto", check=True, budget=QUICK).run(group)
    assert [row.status for row in rows] == ["ok", "ok"]


def test_a_timed_row_is_complete():
    (row,) = Runner("cpu", "reference", check=True, budget=QUICK).run(
        Group(SHAPE, "fwd_bwd", ("flash",))
    )
    assert row.status == "ok"
    assert row.q1_s <= row.median_s <= row.q3_s
    assert row.flops_per_s == pytest.approx(row.flops / row.median_s)
    assert 0 < row.percent_of_peak < 200
    assert {"out", "dq", "small dk", "small dv"} <= set(row.errors)
    assert set(row.limits) == set(row.errors)


@pytest.mark.slow
def test_a_dead_worker_costs_one_group():
    import os

    group = Group(Shape(T=64, D=16), "fwd", ("sdpa",))
    with IsolatedRunner("cpu", "reference", check=True, budget=QUICK) as runner:
        assert [row.status for row in runner.run(group)] == ["ok"]
        runner._pool.submit(os._exit, 1)
        assert [row.status for row in runner.run(group)] == ["error"]
        assert [row.status for row in runner.run(group)] == ["ok"]
        assert runner.peaks["fp32"] > 0


@pytest.mark.slow
def test_inputs_that_do_not_fit_cost_one_group():
    huge = Group(Shape(T=1 << 40), "fwd", ("sdpa", "flash"))
    with IsolatedRunner("cpu", "reference", check=True, budget=QUICK) as runner:
        rows = runner.run(huge)
    assert [row.status for row in rows] == ["error", "error"]
    assert "RuntimeError" in rows[0].reason


def test_inputs_repeat_with_their_seed_and_differ_between_seeds():
    one, same, other = (make_inputs(SHAPE, "cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.tensors[0], same.tensors[0])
    assert not torch.equal(one.tensors[0], other.tensors[0])
    assert not torch.equal(one.tensors[1], one.tensors[2])


def test_branches_of_the_short_check_span_several_segments():
    assert SMALL_BRANCHES["segment_lengths"][0] * 4 <= 500 < SMALL_BRANCHES["segment_lengths"][-1]


def test_relative_rms():
    x = torch.randn(100)
    assert relative_rms(x, x) == 0
    assert relative_rms(x * 1.1, x) == pytest.approx(0.1, rel=1e-5)
    assert relative_rms(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_rms(torch.full((3,), float("nan")), torch.ones(3)) != 0


def test_peak_memory_of_a_known_call():
    MiB = 1 << 20

    def call():
        scratch = torch.ones(64 * MiB // 4)
        return (scratch[: 16 * MiB // 4] * 2).clone(), [torch.ones(8 * MiB // 4)]

    call()
    extra = peak_extra_bytes(call)
    if extra is None:
        pytest.skip("this system does not tell its peak memory")
    assert 56 * MiB < extra < 90 * MiB  # scratch and a product, less the outputs that came later


def test_storage_bytes_count_a_storage_once():
    x = torch.zeros(100)
    assert storage_bytes((x, [x[:10], x.view(10, 10)], None)) == 400
