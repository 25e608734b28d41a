"""lctx::carry_bwd_begin, carry_bwd_step and carry_bwd_end against the definition in fp64."""

import itertools

import pytest
import torch
from gpu_checks import HALF, gpu_qkv, needs_kernel
from helpers import errors

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("ring_bwd")
OPS = torch.ops.lctx

# Rows [q0, q1) and keys [k0, k1) of calls, causal, window and start; what they make together.
SQUARE = [(0, 1100, 0, 1100, True, 0, 0)], {}
PIECES = (
    [
        (0, 333, 0, 333, True, 0, 0),
        (333, 1100, 333, 1100, True, 0, 0),
        (333, 1100, 0, 333, False, 0, 0),
    ],
    {},
)
FULL = [(0, 1100, 700, 1100, False, 0, 0), (0, 1100, 0, 700, False, 0, 0)], {"causal": False}
WINDOW = (
    [
        (0, 500, 0, 500, True, 300, 0),
        (500, 1100, 201, 500, True, 300, -299),
        (500, 1100, 500, 1100, True, 300, 0),
    ],
    {"window": 300},
)


def backward(x, dout, out, lse, calls, *, fixed=True, groups=1, streams=(None,)):
    """dq, dk, dv of calls, each a launch a group of heads, dealt to streams."""
    (q, k, v), D = x, x[0].shape[-1]
    rows, dq_sum = OPS.carry_bwd_begin(dout, None, out, lse, fixed)
    dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
    block = 128 if D <= 64 else 80 if fixed else 64
    caller = torch.cuda.current_stream()
    for i, (q0, q1, k0, k1, causal, window, start) in enumerate(calls):
        front = q0 % block
        at, keys, stream = slice(q0 - front, q1), slice(k0, k1), streams[i % len(streams)]
        if stream is not None:
            stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            for key_heads in torch.arange(k.shape[2]).chunk(groups):
                h0, h1 = int(key_heads[0]), int(key_heads[-1]) + 1
                G = q.shape[2] // k.shape[2]
                mine, theirs = slice(h0 * G, h1 * G), slice(h0, h1)
                OPS.carry_bwd_step(
                    dout[:, at, mine], q[:, at, mine], k[:, keys, theirs], v[:, keys, theirs],
                    rows, dq_sum, dk[:, keys, theirs], dv[:, keys, theirs], causal, D**-0.5,
                    window, 0, start + front, q0 - front, h0 * G, False, front, fixed,
                )  # fmt: skip
    for stream in streams:
        if stream is not None:
            caller.wait_stream(stream)
    return OPS.carry_bwd_end(dq_sum, q, D**-0.5, fixed), dk, dv


def tensors(D, dtype=torch.bfloat16, T=1100, B=2):
    return gpu_qkv(B, T, 4, D, Hkv=2, dtype=dtype), gpu_qkv(B, T, 4, D, dtype=dtype, seed=5)[0]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [40, 64, 96, 128])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("calls, options", [SQUARE, PIECES, FULL, WINDOW])
@pytest.mark.parametrize("fixed", [True, False])
def test_steps_make_the_gradients(fixed, calls, options, groups, D, dtype):
    x, dout = tensors(D, dtype)
    leaves = [t.double().requires_grad_() for t in x]
    exact = torch.autograd.grad(
        reference.flash_attention(*leaves, **options)[0], leaves, dout.double()
    )
    single = [t.requires_grad_() for t in x]
    out, lse = lk.flash_attention(*single, return_lse=True, **options)
    theirs = torch.autograd.grad(out, single, dout)
    with torch.no_grad():
        mine = backward(x, dout, out, lse, calls, fixed=fixed, groups=groups)
    for ours, alone, wanted in zip(mine, theirs, exact, strict=True):
        assert errors(ours, wanted).rms <= 1.02 * errors(alone, wanted).rms


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("calls, options", [PIECES, WINDOW])
def test_same_bits_from_run_to_run(calls, options, D):
    x, dout = tensors(D)
    out, lse = lk.flash_attention(*x, return_lse=True, **options)
    first = backward(x, dout, out, lse, calls)
    for _ in range(10):
        assert all(map(torch.equal, first, backward(x, dout, out, lse, calls)))


@pytest.mark.parametrize("D", [64, 128])
def test_same_bits_in_streams_of_their_own(D):
    """Documents at once, whose edges lie in the middle of blocks of rows."""
    x, dout = tensors(D, T=6000, B=1)
    bounds = [0, 1, 700, 701, 2111, 3000, 4099, 6000]
    documents = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    out, lse = lk.flash_attention(*x, cu_seqlens=documents, return_lse=True)
    calls = [(a, b, a, b, True, 0, 0) for a, b in itertools.pairwise(bounds)]
    first = backward(x, dout, out, lse, calls)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(10):
        again = backward(x, dout, out, lse, calls, streams=streams)
        torch.cuda.synchronize()
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("D", [40, 64, 128])
@pytest.mark.parametrize("fixed", [True, False])
def test_first_sums_are_stored(fixed, D):
    """The bits of an addition to zeros, and nothing of what was there; other keys stay."""
    x, dout = tensors(D)
    out, lse = lk.flash_attention(*x, return_lse=True)
    rows, dq_sum = OPS.carry_bwd_begin(dout, None, out, lse, fixed)
    found = []
    for first in (True, False):
        wide = [torch.full((2, 1100, 4, D), torch.nan if first else 0.0).cuda() for _ in range(2)]
        dk, dv = (t[:, 30:1031, 1:3] for t in wide)
        step = (x[1][:, :1001], x[2][:, :1001], rows, dq_sum, dk, dv, True, 0.1, 0, 0, 0, 0, 0)
        OPS.carry_bwd_step(dout, x[0], *step, first, 0, fixed)
        found.append([t.clone() for t in (dk, dv)])
        for t, part in zip(wide, (dk, dv), strict=True):
            assert not part.isnan().any() and part.any()
            part.fill_(1.0)
            untouched = t.isnan() if first else t == 0
            assert untouched.sum() == t.numel() - part.numel()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [40, 64, 128])
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("fixed", [True, False])
def test_results_are_rounded_sums(fixed, window, D, dtype):
    """The bits of sums that are rounded behind the kernel; other rows and heads stay."""
    x, dout = tensors(D, dtype)
    out, lse = lk.flash_attention(*x, return_lse=True)
    rows, dq_sum = OPS.carry_bwd_begin(dout, None, out, lse, fixed)
    sums = [torch.empty(2, 1001, 2, D, device="cuda") for _ in range(2)]
    wide = [torch.full((2, 1100, 4, D), torch.nan, dtype=dtype, device="cuda") for _ in range(2)]
    results = [t[:, 30:1031, 1:3] for t in wide]
    keys, last = (x[1][:, :1001], x[2][:, :1001], rows, dq_sum), (True, 0.1, window, 0, 0, 0, 0)
    for dk, dv in (sums, results):
        OPS.carry_bwd_step(dout, x[0], *keys, dk, dv, *last, True, 0, fixed)
    for total, result, t in zip(sums, results, wide, strict=True):
        assert torch.equal(total.to(dtype), result) and total.any()
        assert t.isnan().sum() == t.numel() - result.numel()
    with pytest.raises(ValueError, match="expected first = True"):
        OPS.carry_bwd_step(dout, x[0], *keys, *results, *last, False, 0, fixed)


def test_statistics_of_the_other_form_are_refused():
    x, dout = tensors(128)
    out, lse = lk.flash_attention(*x, return_lse=True)
    rows, dq_sum = OPS.carry_bwd_begin(dout, None, out, lse, False)
    dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in x[1:])
    with pytest.raises(ValueError, match="blocks of 80"):
        OPS.carry_bwd_step(dout, *x, rows, dq_sum, dk, dv, True, 0.1, 0, 0, 0, 0, 0, False, 0, True)
    with pytest.raises(ValueError, match="dq_sum is not that of 1100 rows"):
        OPS.carry_bwd_end(dq_sum, x[0], 0.1, True)
