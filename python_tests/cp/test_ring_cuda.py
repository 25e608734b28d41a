"""ring_attention on one GPU, whose ranks are simulated."""

import pytest
import torch
from cp_plans import LAYOUTS, int32
from gpu_checks import HALF, LSE_TOLERANCE, check_result, gpu_qkv, needs_kernel
from helpers import errors

import lctx_kernels as lk
from lctx_kernels import _ops, cp, reference
from lctx_kernels.cp import together
from lctx_kernels.cp.keys import Rank
from lctx_kernels.cp.schedule import schedule_of
from lctx_kernels.cp.together import two_steps
from lctx_kernels.cp.transport import Simulator

pytestmark = needs_kernel("ring_fwd")
needs_backward = pytest.mark.skipif(
    "cuda" not in _ops.KERNELS.get("ring_bwd", ()), reason="built without a CUDA ring_bwd"
)


def simulated(plan, q, k, v, **options):
    parts = (cp.shard(plan, x, 1, None) for x in (q, k, v))
    out, lse = lk.ring_attention(*parts, plan=plan, transport="sim", return_lse=True, **options)
    return cp.unshard(plan, out, 1, "sim"), cp.unshard(plan, lse, 2, "sim")


def whole(plan, q, k, v, **options):
    documents = int32(plan.documents).cuda() if len(plan.documents) > 2 else None
    return reference.flash_attention(
        q.double(), k.double(), v.double(), cu_seqlens=documents, **options
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("n", [1, 2, 5, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_simulated_ranks(layout, n, D, dtype):
    q, k, v = gpu_qkv(2, 1100, 4, D, Hkv=2, dtype=dtype)
    plan = cp.make_plan(1100, n, layout=layout)
    for options in ({}, {"causal": False}, {"window": 300}):
        check_result(simulated(plan, q, k, v, **options), whole(plan, q, k, v, **options), q, k, v)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents(layout):
    q, k, v = gpu_qkv(1, 1100, 4, 128, Hkv=2)
    plan = cp.make_plan(1100, 4, layout=layout, cu_seqlens=int32([0, 1, 300, 300, 999, 1100]))
    check_result(simulated(plan, q, k, v), whole(plan, q, k, v), q, k, v)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [2, 3, 8, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 300}], ids=str)
def test_results_are_as_accurate_as_on_one_device(options, layout, n, dtype):
    check_accuracy(cp.make_plan(1100, n, layout=layout), dtype, options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [2, 3, 8, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 300}], ids=str)
def test_documents_are_as_accurate_as_on_one_device(options, layout, n, dtype):
    bounds = int32([0, 1, 300, 300, 999, 1100])
    check_accuracy(cp.make_plan(1100, n, layout=layout, cu_seqlens=bounds), dtype, options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("options", [{}, {"causal": False}], ids=str)
def test_first_two_steps_in_one_kernel(options, n, dtype, monkeypatch):
    """Tiles have rows that see the foreign keys and rows that do not."""
    monkeypatch.setattr(together, "MARGIN", 1e-3)  # as if a hop took next to no time
    monkeypatch.setattr(together, "WORTH", 0.0)
    plan = cp.make_plan(4096 * n + 37, n)
    schedule = schedule_of(plan, options.get("causal", True), 0)
    for rank, length in enumerate(plan.lengths):
        sizes = [(2, length, heads, 128) for heads in (4, 2, 2)]
        x = [torch.empty(size, dtype=dtype, device="meta") for size in sizes]
        at = Rank(rank, schedule, Simulator(n).rank(rank), 1.0)
        assert two_steps(at, *x) is not None
    check_accuracy(plan, dtype, options)


def check_accuracy(plan, dtype, options):
    """Error of out at most 1.02 times that of one device, the same in every call."""
    packed = len(plan.documents) > 2
    documents = int32(plan.documents).cuda() if packed else None
    q, k, v = gpu_qkv(1 if packed else 2, plan.seq_len, 4, 128, Hkv=2, dtype=dtype)
    exact, exact_lse = whole(plan, q, k, v, **options)
    single = lk.flash_attention(q, k, v, cu_seqlens=documents, **options)
    (out, lse), (again, lse_again) = (simulated(plan, q, k, v, **options) for _ in range(2))
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    torch.testing.assert_close(lse.double(), exact_lse.double(), **LSE_TOLERANCE)
    assert errors(out, exact).rms <= 1.02 * errors(single, exact).rms


@needs_backward
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [1024, 1100])  # some own keys are nobody else's in one call, or not
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 300}], ids=str)
def test_gradients_are_as_accurate_as_on_one_device(options, T, layout, n, dtype):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(2, T, 4, 128, Hkv=2, dtype=dtype))
    dout = gpu_qkv(2, T, 4, 128, dtype=dtype, seed=5)[0]
    exact_leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = whole(cp.make_plan(T, 1), *exact_leaves, **options)[0]
    exact = torch.autograd.grad(out, exact_leaves, dout.double())
    single = torch.autograd.grad(lk.flash_attention(q, k, v, **options), (q, k, v), dout)
    plan = cp.make_plan(T, n, layout=layout)
    first, second = (
        torch.autograd.grad(simulated(plan, q, k, v, **options)[0], (q, k, v), dout)
        for _ in range(2)
    )
    for ours, again, theirs, wanted in zip(first, second, single, exact, strict=True):
        assert torch.equal(ours, again)
        assert errors(ours, wanted).rms <= 1.02 * errors(theirs, wanted).rms


@needs_backward
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_documents(deterministic, layout, n, D):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(1, 1100, 4, D, Hkv=2))
    dout = gpu_qkv(1, 1100, 4, D, seed=5)[0]
    exact_leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    documents = int32([0, 1, 300, 300, 999, 1100])  # no chunk begins with a block of rows
    plan = cp.make_plan(1100, n, layout=layout, cu_seqlens=documents)
    out = whole(plan, *exact_leaves)[0]
    exact = torch.autograd.grad(out, exact_leaves, dout.double())
    alone = lk.flash_attention(q, k, v, cu_seqlens=documents.cuda())
    single = torch.autograd.grad(alone, (q, k, v), dout)
    out = simulated(plan, q, k, v, deterministic=deterministic)[0]
    for mine, theirs, wanted in zip(
        torch.autograd.grad(out, (q, k, v), dout), single, exact, strict=True
    ):
        assert errors(mine, wanted).rms <= 1.02 * errors(theirs, wanted).rms


@needs_backward
@pytest.mark.parametrize("D", [40, 64, 96, 128, 256])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 700}], ids=str)
@pytest.mark.parametrize("bounds", [[0, 2900], [0, 1, 300, 300, 1999, 2900]], ids=len)
def test_gradients_have_the_same_bits_every_time(bounds, options, D):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(1, 2900, 4, D, Hkv=2))
    plan = cp.make_plan(2900, 3, cu_seqlens=int32(bounds))
    dout = gpu_qkv(1, 2900, 4, D, seed=5)[0]
    out = simulated(plan, q, k, v, **options)[0]
    first, *more = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(10))
    for again in more:
        assert all(map(torch.equal, first, again))


@needs_backward
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("T", [1024, 1100])  # rows of calls begin with blocks of 64, or do not
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 300}], ids=str)
def test_gradients_that_need_not_be_reproducible(options, n, T, D):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(2, T, 4, D, Hkv=2))
    dout = gpu_qkv(2, T, 4, D, seed=5)[0]
    exact_leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = whole(cp.make_plan(T, 1), *exact_leaves, **options)[0]
    exact = torch.autograd.grad(out, exact_leaves, dout.double())
    single = torch.autograd.grad(lk.flash_attention(q, k, v, **options), (q, k, v), dout)
    out, lse = simulated(cp.make_plan(T, n), q, k, v, deterministic=False, **options)
    ours = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for mine, theirs, wanted in zip(ours, single, exact, strict=True):
        assert errors(mine, wanted).rms <= 1.02 * errors(theirs, wanted).rms
    through_lse = torch.autograd.grad(lse.sum(), q)[0]
    alone = lk.flash_attention(q, k, v, return_lse=True, **options)[1]
    torch.testing.assert_close(
        through_lse.float(), torch.autograd.grad(alone.sum(), q)[0].float(), atol=1e-2, rtol=2e-2
    )


@needs_backward
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """Of q and out on every rank; the last rows of both ranks see keys of a window only."""
    rows, window, checked = (1 << 19) + 4096, 512, 256
    plan = cp.make_plan(2 * rows, 2, layout="contiguous")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.empty(1, 2 * rows, heads, 128, device="cuda", dtype=torch.bfloat16).normal_(
            generator=generator
        )
        for heads in (32, 1, 1, 32)
    )
    assert q[:, :rows].numel() > 2**31
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = lk.ring_attention(*leaves, plan=plan, window=window, transport="sim")
    dq = torch.autograd.grad(out, leaves, dout)[0]
    for end in (rows, rows + checked, 2 * rows):  # the second sees keys of both ranks
        seen = slice(end - checked - window + 1, end)
        last = [q[:, end - checked : end], k[:, seen], v[:, seen]]
        last = [x.detach().double().requires_grad_() for x in last]
        exact = reference.flash_attention(*last, window=window)[0]
        wanted = torch.autograd.grad(exact, last[0], dout[:, end - checked : end].double())[0]
        assert errors(out[:, end - checked : end], exact).rms < 5e-3
        assert errors(dq[:, end - checked : end], wanted).rms < 1e-2
