"""Calls like one that was accepted are not checked again; all others are."""

import pytest
import torch
from api.op_calls import qkv
from api.test_checks import EVERY, FOR_ALL_ATTENTIONS, OF_ONE_OP, complete

import lctx_kernels as lk
from lctx_kernels import _checks

REFUSED = [(op, *case) for op in EVERY for case in FOR_ALL_ATTENTIONS]
REFUSED += [(op, *case) for op, cases in OF_ONE_OP.items() for case in cases]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(_checks, "_accepted", {})


@pytest.fixture
def checked(monkeypatch):
    """The ops that were checked."""
    made, reasons = [], _checks.reasons

    def counted(op, arguments):
        made.append(op)
        return reasons(op, arguments)

    monkeypatch.setattr(_checks, "reasons", counted)
    return made


@pytest.mark.parametrize(("op", "arguments", "error", "text"), REFUSED)
def test_a_call_is_refused_behind_accepted_ones(op, arguments, error, text):
    getattr(lk, op)(**complete(op, {}))
    with pytest.raises(error) as raised:
        getattr(lk, op)(**complete(op, arguments))
    assert all(part in str(raised.value) for part in text.split(".*"))


@pytest.mark.parametrize("op", [*EVERY, "merge_attention"])
def test_an_equal_call_is_not_checked_again(op, checked):
    first, second = complete(op, {}), complete(op, {})
    second = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in second.items()}
    for arguments in (first, second, first):
        getattr(lk, op)(**arguments)
    assert checked == [op]


def test_what_an_equal_call_is(checked):
    """Types, as True == 1, gradients, autocast and strides count."""
    q, k, v = qkv()
    lk.flash_attention(q, k, v, scale=1.0)
    calls = 1
    for arguments, options in (
        ((q, k, v), {"scale": 1}),
        ((q, k, v), {"scale": 0.5}),
        ((q.clone().requires_grad_(), k, v), {"scale": 1.0}),
        ((q.mT.contiguous().mT[..., :1], k[..., :1], v), {"scale": 1.0}),
        ((torch.nn.Parameter(q), k, v), {"scale": 1.0, "deterministic": True}),
    ):
        lk.flash_attention(*arguments, **options)
        calls += 1
        assert len(checked) == calls
    with torch.autocast("cpu", torch.bfloat16):
        lk.flash_attention(q, k.bfloat16(), v, scale=1.0)
        lk.flash_attention(q, k, v, scale=1.0)
    assert len(checked) == calls + 2
    with pytest.raises(TypeError, match="causal is 1"):
        lk.flash_attention(q, k, v, scale=1.0, causal=1)
    with pytest.raises(TypeError, match="k is bfloat16"):
        lk.flash_attention(q, k.bfloat16(), v, scale=1.0)


def test_values_that_rules_read_are_read_every_time():
    q, k, v = qkv(B=1)
    bounds = torch.tensor([0, 5, 19], dtype=torch.int32)
    lk.flash_attention(q, k, v, cu_seqlens=bounds)
    bounds[1] = 20
    with pytest.raises(ValueError, match="cu_seqlens is"):
        lk.flash_attention(q, k, v, cu_seqlens=bounds)


def test_another_device_is_checked():
    q, k, v = qkv()
    lk.flash_attention(q, k, v)
    with pytest.raises(ValueError, match="k is on meta"):
        lk.flash_attention(q, k.to("meta"), v)
    assert not [key for key in _checks._accepted if "meta" in str(key)]


def test_what_is_remembered_keeps_nothing_alive_and_ends(monkeypatch):
    monkeypatch.setattr(_checks, "MOST_ACCEPTED", 4)
    for T in range(2, 20):
        lk.flash_attention(*qkv(T))
        assert 1 <= len(_checks._accepted) <= 4
    plan = lk.cp.make_plan(38, 2)
    lk.ring_attention(*qkv(38), plan=plan, transport="sim")
    held = [part for key in _checks._accepted for part in key if part is plan]
    assert not held and len(_checks._accepted) <= 4
