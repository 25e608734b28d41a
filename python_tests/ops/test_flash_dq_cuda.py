"""The deterministic gradient of the queries on a Hopper GPU against the definition in fp64."""

import pytest
import torch
from gpu_checks import HALF, check_gradients, gpu_qkv, needs_kernel

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("flash_bwd")


def check(q, k, v, **options):
    check_gradients(lk.flash_attention, reference.flash_attention, q, k, v, wanted="q", **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 96, 128, 136, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dimensions(D, causal, dtype):
    check(*gpu_qkv(2, 333, 4, D, Hkv=2, dtype=dtype), causal=causal)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(
    ("Tq", "Tk"), [(1, 1), (1, 777), (63, 63), (129, 1000), (1000, 129), (700, 701), (192, 384)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(Tq, Tk, D, causal):
    check(*gpu_qkv(1, Tq, 2, D, Tk=Tk), causal=causal)


@pytest.mark.parametrize("Hkv", [1, 2, 8])
def test_grouped_queries(Hkv):
    check(*gpu_qkv(2, 300, 8, 128, Hkv=Hkv))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 17, 128, 500, 5000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(window, causal, D):
    check(*gpu_qkv(1, 900, 2, D), window=window, causal=causal)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [[0, 700], [0, 1, 1, 65, 256, 700], [0, 0, 192, 384, 699, 700]])
def test_documents(bounds, causal, D):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    q, k, v = gpu_qkv(1, bounds[-1], 4, D, Hkv=2)
    check(q, k, v, cu_seqlens=cu_seqlens, causal=causal)
    check(q, k, v, cu_seqlens=cu_seqlens, causal=causal, window=33)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_strides(D):
    packed = torch.randn(2, 300, 4, 3, D + 8, device="cuda").bfloat16()
    q, k, v = (packed[:, :, :, i, :D] for i in range(3))
    check(q, k, v)
    check(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)))


@pytest.mark.parametrize("D", [64, 128, 256])
def test_more_tiles_than_multiprocessors(D):
    check(*gpu_qkv(3, 1500, 24, D, Hkv=3))


@pytest.mark.parametrize("D", [64, 128, 256])
def test_same_bits_every_time(D):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(2, 1500, 8, D, Hkv=2))
    dout = torch.randn_like(q)

    def grad():
        out = lk.flash_attention(q, k, v, deterministic=True)
        return torch.autograd.grad(out, q, dout)[0]

    first = grad()
    assert all(torch.equal(grad(), first) for _ in range(100))
