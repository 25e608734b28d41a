"""lctx::flash_carry, its backward and attn_delta on the CPU: pieces of the keys make the whole."""

import pytest
import torch
from helpers import ALL_DTYPES, assert_close_to_reference, errors, random_qkv, random_tensor, worse
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import cotangents, self_attention_errors

from lctx_kernels import flash_attention, reference

OPS = torch.ops.lctx


def definition(q, k, v, query_start=0, *, causal, window):
    """Attention of queries at query_start, ... over keys at 0, 1, ..., by whole sequences."""
    B, Tq, H, D = q.shape
    T = max(query_start + Tq, k.shape[1])
    padded = torch.cat([q.new_zeros(B, query_start, H, D), q, q.new_zeros(B, T, H, D)], 1)[:, :T]
    visible = torch.arange(T)[:, None] - torch.arange(k.shape[1])
    visible = (visible >= 0 if causal else visible == visible) & (visible.abs() < (window or T + 1))
    k, v = (x.repeat_interleave(H // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", padded, k) * D**-0.5
    scores = scores.masked_fill(~visible, -torch.inf)[:, :, query_start : query_start + Tq]
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
    out = torch.einsum("bhij,bjhd->bihd", (scores - lse).exp(), v)
    return out, lse.masked_fill(empty, -torch.inf)[..., 0]


def by_steps(q, k, v, cuts, order, *, dout, dlse, causal, window=0, query_start=0):
    """out, lse, dq, dk, dv from one call per piece [cuts[i], cuts[i + 1]), all state NaN at first.

    State and gradients are slices of larger tensors, as a ring has them.
    """
    (B, T, H, D), stat = q.shape, torch.promote_types(q.dtype, torch.float32)
    Dv = v.shape[-1]
    carry = q.new_full((B, T + 5, H, Dv), torch.nan, dtype=stat)[:, 2 : T + 2]
    says_first = order[0] % 2 == 0  # else lse says it
    unread = torch.nan if says_first else -torch.inf
    lse = q.new_full((B, H, T + 3), unread, dtype=stat)[:, :, 3:]
    options = (causal, D**-0.5, window, query_start)
    for step, piece in enumerate(order):
        rows = slice(cuts[piece], cuts[piece + 1])
        last = step == len(order) - 1
        before = carry.clone()
        out = OPS.flash_carry(
            q, k[:, rows], v[:, rows], carry, lse, *options, rows.start, last,
            says_first and step == 0,
        )  # fmt: skip
        assert out.shape == ((*q.shape[:3], Dv) if last else (0, 0, 0, 0))
    assert torch.equal(carry.nan_to_num(), before.nan_to_num())  # the last step leaves it alone

    delta = lse.new_empty(B, H, T + 3)[:, :, 3:]
    delta.copy_(OPS.attn_delta(dout, dlse, out))
    grads = [torch.zeros(x.shape[0], x.shape[1] + 4, *x.shape[2:], dtype=stat)[:, 1:-3]
             for x in (q, k, v)]  # fmt: skip
    for piece in order:
        rows = slice(cuts[piece], cuts[piece + 1])
        OPS.flash_carry_bwd(
            dout, q, k[:, rows], v[:, rows], lse, delta, grads[0], grads[1][:, rows],
            grads[2][:, rows], *options, rows.start, True,
        )  # fmt: skip
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def exact(q, k, v, query_start, dout, dlse, **options):
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = definition(*leaves, query_start, **options)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    grads = torch.autograd.grad((out * dout).sum() + (finite * dlse).sum(), leaves)
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out, lse, *grads), strict=True))


def check(dtype, *, B=2, Tq=70, Tk=None, Hq=4, Hkv=2, Dk=16, Dv=None, cuts, order, query_start=0,
          causal=True, window=0):  # fmt: skip
    q, k, v = random_qkv(B, Tq, Hq, Dk, Tk=Tk, Hkv=Hkv, Dv=Dv, dtype=dtype)
    shapes = {"out": (B, Tq, Hq, Dv or Dk), "lse": (B, Hq, Tq)}
    cotangent = cotangents(shapes)
    dout, dlse = (
        cotangent["out"].to(dtype),
        cotangent["lse"].to(torch.promote_types(dtype, torch.float32)),
    )
    ours = by_steps(q, k, v, cuts, order, dout=dout, dlse=dlse, causal=causal, window=window,
                    query_start=query_start)  # fmt: skip
    wanted = exact(q, k, v, query_start, dout.double(), dlse.double(), causal=causal, window=window)
    baseline = {}
    if dtype != torch.float64:
        baseline = self_attention_errors(max(Tq, 64), Hq, Hkv, Dk, 1.0, dtype, True, None)
        dense = flash_baseline(q, k, v, dout, dlse, query_start, wanted, causal, window)
        baseline = worse(baseline, dense)
    for name, expected in wanted.items():
        assert_close_to_reference(name, ours[name], expected, baseline.get(name))


def flash_baseline(q, k, v, dout, dlse, query_start, wanted, causal, window):
    """Errors of the definition run by PyTorch in this dtype."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = definition(*leaves, query_start, causal=causal, window=window)
    lse = lse.to(dlse)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    loss = (out * dout.to(out)).float().sum() + (finite * dlse).sum()
    results = dict(
        zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *torch.autograd.grad(loss, leaves)),
            strict=True)
    )  # fmt: skip
    return {n: errors(results[n], wanted[n]) for n in wanted}


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", [[0], [0, 1, 2, 3], [3, 1, 0, 2]])
def test_pieces_make_the_whole(order, causal, dtype):
    cuts = [0, 70] if len(order) == 1 else [0, 13, 14, 50, 70]
    check(dtype, cuts=cuts, order=order, causal=causal)


@settings(max_examples=60)
@given(data=st.data())
def test_any_positions(data):
    """Any query positions, lengths, windows, head counts, pieces in any order."""
    draw = data.draw
    Tk, Tq, start = draw(st.integers(0, 40)), draw(st.integers(0, 40)), draw(st.integers(0, 50))
    cuts = sorted({0, Tk, *draw(st.lists(st.integers(0, Tk), max_size=4))})
    cuts = cuts if len(cuts) > 1 else [0, 0]
    order = draw(st.permutations(range(len(cuts) - 1)))
    Hkv = draw(st.sampled_from([1, 2]))
    check(
        torch.float64, B=draw(st.integers(1, 2)), Tq=Tq, Tk=Tk, Hq=Hkv * draw(st.integers(1, 2)),
        Hkv=Hkv, Dk=draw(st.sampled_from([1, 8, 20])), Dv=draw(st.sampled_from([1, 8, 24])),
        cuts=cuts, order=order, query_start=start, causal=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 1, 5, 30, 1000])),
    )  # fmt: skip


def test_queries_before_all_keys_carry_nothing():
    q, k, v = random_qkv(1, 20, 2, 8, dtype=torch.float32)
    carry = torch.full(q.shape, torch.nan)
    lse = torch.full((1, 2, 20), -torch.inf)
    arguments = (q, k, v, carry, lse, True, 0.125, 0, 0, 1000)
    OPS.flash_carry(*arguments, False)
    assert (carry == 0).all() and (lse == -torch.inf).all()
    out = OPS.flash_carry(*arguments, True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_rows_without_keys_have_no_gradient():
    q, k, v = random_qkv(1, 20, 2, 8, dtype=torch.float32)
    lse, delta = torch.full((1, 2, 20), -torch.inf), torch.ones(1, 2, 20)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    OPS.flash_carry_bwd(q, q, k, v, lse, delta, *grads, False, 0.1, 0, 0, 0, True)
    assert all((g == 0).all() for g in grads)


def test_equals_flash_attention_bit_for_bit_in_one_step():
    """One step over all keys is flash_attention: the ring of one rank costs no accuracy."""
    q, k, v = random_qkv(2, 100, 4, 32, Hkv=2, dtype=torch.bfloat16)
    carry, lse = torch.empty(q.shape), torch.full((2, 4, 100), -torch.inf)
    out = OPS.flash_carry(q, k, v, carry, lse, True, 32**-0.5, 0, 0, 0, True)
    whole, whole_lse = flash_attention(q, k, v, return_lse=True)
    assert torch.equal(out, whole) and torch.equal(lse, whole_lse)


def test_delta():
    out, dout = random_tensor(2, 9, 3, 5, seed=1), random_tensor(2, 9, 3, 5, seed=2)
    dlse = random_tensor(2, 3, 9, seed=3)
    delta = OPS.attn_delta(dout, dlse, out)
    torch.testing.assert_close(delta, (out * dout).sum(-1).transpose(1, 2) - dlse)
    assert torch.equal(OPS.attn_delta(dout, None, out), OPS.attn_delta(dout, 0 * dlse, out))


BAD = {
    "carry_out is float64": lambda a: a | {"carry_out": a["carry_out"].double()},
    "lse has shape": lambda a: a | {"lse": a["lse"][:, :1]},
    "lse has stride": lambda a: a | {"lse": torch.zeros(1, 2, 40)[:, :, ::2]},
    "positions apart": lambda a: a | {"key_start": 2**40},
    "window = -1": lambda a: a | {"window": -1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_refused(message):
    q, k, v = random_qkv(1, 20, 2, 8, dtype=torch.float32)
    given = {
        "q": q, "k": k, "v": v, "carry_out": torch.zeros_like(q), "lse": torch.zeros(1, 2, 20),
        "causal": True, "scale": 0.1, "window": 0, "query_start": 0, "key_start": 0, "last": False,
    }  # fmt: skip
    OPS.flash_carry(*given.values())
    with pytest.raises(ValueError, match=message):
        OPS.flash_carry(*BAD[message](given).values())


def test_bad_gradients_are_refused():
    q, k, v = random_qkv(1, 20, 2, 8, dtype=torch.float32)
    lse = torch.zeros(1, 2, 20)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    tail = (True, 0.1, 0, 0, 0, True)
    with pytest.raises(ValueError, match="delta and lse have different strides"):
        OPS.flash_carry_bwd(q, q, k, v, lse, torch.zeros(1, 2, 30)[..., :20], *grads, *tail)
    with pytest.raises(ValueError, match="dk is bfloat16"):
        OPS.flash_carry_bwd(q, q, k, v, lse, lse, grads[0], grads[1].bfloat16(), grads[2], *tail)


def test_reference_of_this_file_is_the_definition():
    q, k, v = random_qkv(2, 30, 4, 8, Hkv=2, dtype=torch.float64)
    for options in ({"causal": True, "window": 7}, {"causal": False, "window": None}):
        ours = definition(q, k, v, **options)
        for got, wanted in zip(ours, reference.flash_attention(q, k, v, **options), strict=True):
            torch.testing.assert_close(got, wanted)
