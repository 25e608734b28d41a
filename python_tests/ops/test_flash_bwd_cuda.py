"""The gradients of flash_attention on a Hopper GPU, with and without a fixed order of sums."""

import pytest
import torch
from gpu_checks import HALF, check_gradients, gpu_qkv, needs_kernel
from torch.profiler import ProfilerActivity, profile

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("flash_bwd")
deterministic = pytest.mark.parametrize("deterministic", [False, True])


def check(q, k, v, **options):
    check_gradients(lk.flash_attention, reference.flash_attention, q, k, v, **options)


@deterministic
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 96, 128, 136, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dimensions(D, causal, dtype, deterministic):
    check(*gpu_qkv(2, 333, 4, D, Hkv=2, dtype=dtype), causal=causal, deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(
    ("Tq", "Tk"),
    [(1, 1), (1, 777), (63, 63), (129, 1000), (1000, 129), (700, 701), (192, 384)],
)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(Tq, Tk, D, causal, deterministic):
    check(*gpu_qkv(1, Tq, 2, D, Tk=Tk), causal=causal, deterministic=deterministic)


@pytest.mark.parametrize("D", [64, 96, 128])
@pytest.mark.parametrize(("T", "H", "Hkv"), [(1000, 34, 17), (1000, 34, 34), (200, 6, 3)])
def test_tiles_of_the_last_round(T, H, Hkv, D):
    """Without a mask they are shared out: 4 of 136 and 8 of 272 tiles on 132 multiprocessors."""
    check(*gpu_qkv(1, T, H, D, Hkv=Hkv), causal=False)


@deterministic
@pytest.mark.parametrize("Hkv", [1, 2, 8])
def test_grouped_queries(Hkv, deterministic):
    check(*gpu_qkv(2, 300, 8, 128, Hkv=Hkv), deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 17, 128, 500, 5000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(window, causal, D, deterministic):
    check(*gpu_qkv(1, 900, 2, D), window=window, causal=causal, deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [[0, 700], [0, 1, 1, 65, 256, 700], [0, 0, 192, 384, 699, 700]])
def test_documents(bounds, causal, D, deterministic):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    q, k, v = gpu_qkv(1, bounds[-1], 4, D, Hkv=2)
    for window in (None, 33):
        check(
            q, k, v, cu_seqlens=cu_seqlens, causal=causal, window=window,
            deterministic=deterministic,
        )  # fmt: skip


@deterministic
def test_long_rows(deterministic):
    check(*gpu_qkv(1, 5000, 2, 128, Hkv=1), deterministic=deterministic)


@pytest.mark.parametrize(
    "Tq, Tk, D", [(3000, 3000, 128), (2200, 3000, 128), (3900, 3000, 128), (3000, 3000, 64)]
)
def test_few_tiles_are_shared_out(Tq, Tk, D):
    check(*gpu_qkv(1, Tq, 4, D, Hkv=1, Tk=Tk), causal=True, deterministic=False)


@deterministic
def test_empty_tensors(deterministic):
    for B, Tq, Tk in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        q, k, v = (x.requires_grad_() for x in gpu_qkv(B, Tq, 4, 64, Tk=Tk))
        lk.flash_attention(q, k, v, deterministic=deterministic).sum().backward()
        for x in (q, k, v):
            assert x.grad.shape == x.shape and (x.grad == 0).all()


def gradients(q, k, v, dout, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = lk.flash_attention(*leaves, deterministic=True, **options)
    return torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 300}, {"window": 300, "causal": False}]
)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_same_bits_from_run_to_run(D, options):
    q, k, v = gpu_qkv(2, 1500, 4, D, Hkv=2)
    dout = torch.randn_like(q)
    first, *others = (gradients(q, k, v, dout, **options) for _ in range(100))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


# Blocks that wait for others that cannot start would be for ever.
@pytest.mark.parametrize("D", [64, 128])
def test_fixed_orders_of_several_streams(D):
    shapes = [(1, 4000, 12, True), (2, 3000, 8, True), (3, 2500, 8, False)]
    cases = [(gpu_qkv(B, T, H, D), causal) for B, T, H, causal in shapes]
    douts = [torch.randn_like(q) for (q, _, _), _ in cases]

    def run(i):
        return gradients(*cases[i][0], douts[i], causal=cases[i][1])

    alone = [run(i) for i in range(len(cases))]
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        together = []
        torch.cuda.synchronize()
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together.append(run(i))
        torch.cuda.synchronize()
        for right, found in zip(alone, together, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(right, found, strict=True))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_only_wanted_gradients_are_computed(wanted, D):
    q, k, v = gpu_qkv(2, 333, 4, D, Hkv=2, Tk=400)
    check(q, k, v, wanted=wanted)
    leaves = {n: x.requires_grad_(n in wanted) for n, x in zip("qkv", (q, k, v), strict=True)}
    dout = torch.randn_like(q)
    found = []
    for deterministic in (False, True):
        out = lk.flash_attention(*leaves.values(), deterministic=deterministic)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            found.append(torch.autograd.grad(out, [leaves[n] for n in wanted], dout))
        kernels = " ".join(event.key for event in seen.key_averages())
        assert ("attn_dq" in kernels) == (wanted == "q")
        assert ("attn_bwd" in kernels) == (wanted != "q")
    # The kernels of one side alone sum in a fixed order in any case.
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
def test_strides(D, deterministic):
    packed = torch.randn(2, 300, 4, 3, D + 8, device="cuda").bfloat16()
    q, k, v = (packed[:, :, :, i, :D] for i in range(3))
    check(q, k, v, deterministic=deterministic)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    check(*heads_first, deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
def test_more_tiles_than_multiprocessors(D, deterministic):
    check(*gpu_qkv(3, 1500, 24, D, Hkv=3), deterministic=deterministic)
