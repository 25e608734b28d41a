"""flash_attention with few queries over many keys, which splits the keys, on a Hopper GPU."""

import pytest
import torch
from gpu_checks import HALF, check_result, gpu_qkv, needs_kernel

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("flash_fwd")


def check(q, k, v, **options):
    with torch.no_grad():
        result = lk.flash_attention(q, k, v, return_lse=True, **options)
        exact = reference.flash_attention(q.double(), k.double(), v.double(), **options)
    check_result(result, exact, q, k, v)


@pytest.mark.parametrize("Tk", [1, 3, 63, 64, 65, 257, 777, 4999])
@pytest.mark.parametrize("Tq", [1, 2, 5, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(Tq, Tk, causal):
    check(*gpu_qkv(1, Tq, 8, 128, Tk=Tk, Hkv=2), causal=causal)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 12, 64, 71, 128])
@pytest.mark.parametrize("Tq", [1, 5])
def test_grouped_queries(Tq, group):
    check(*gpu_qkv(1, Tq, 2 * group, 128, Tk=1500, Hkv=2))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 64, 80, 128, 136, 256])
@pytest.mark.parametrize("Tq", [1, 16])
def test_head_dimensions(Tq, D, dtype):
    check(*gpu_qkv(2, Tq, 8, D, Tk=3001, Hkv=2, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [56, 64, 128, 248])
@pytest.mark.parametrize(("Tq", "group"), [(1, 8), (3, 2), (1, 9), (2, 8), (4, 4), (16, 1), (4, 5)])
def test_rows_of_a_tile(Tq, group, D, dtype):
    """Up to 8 rows, up to 16, more."""
    check(*gpu_qkv(2, Tq, 2 * group, D, Tk=2500, Hkv=2, dtype=dtype))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 17, 64, 500, 2000, 10000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(window, causal, D):
    check(*gpu_qkv(1, 9, 4, D, Tk=3333), window=window, causal=causal)


@pytest.mark.parametrize("B", [2, 3, 40])
@pytest.mark.parametrize("Tk", [100, 300, 2100])
def test_batches(B, Tk):
    """More and fewer rows than thread blocks, with and without a second kernel."""
    check(*gpu_qkv(B, 3, 16, 64, Tk=Tk, Hkv=8))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(("Hq", "Hkv"), [(8, 2), (1, 1)])
def test_long_caches(Hq, Hkv, D):
    check(*gpu_qkv(1, 1, Hq, D, Tk=65536, Hkv=Hkv))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("Tq", [40, 100, 333])
@pytest.mark.parametrize("causal", [True, False])
def test_pieces_of_a_prompt(Tq, causal, D):
    """Too many rows for one tile, too few tiles for the GPU."""
    check(*gpu_qkv(1, Tq, 6, D, Tk=5000, Hkv=2), causal=causal)
    check(*gpu_qkv(1, Tq, 2, D, Tk=5000), causal=causal, window=700)


def test_fewer_keys_than_queries():
    check(*gpu_qkv(2, 16, 8, 128, Tk=5, Hkv=2))
    check(*gpu_qkv(2, 16, 8, 128, Tk=5, Hkv=2), causal=False)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("length", [1, 500, 2048])
def test_strided_caches(length, D):
    """Views of a (B, H, T, D) cache with room for more, and of keys and values side by side."""
    q, k, v = gpu_qkv(2, 2, 8, D, Tk=2048, Hkv=4)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2)[:, :length] for x in (k, v))
    check(q, k, v)
    check(q, *torch.stack([k, v], dim=2).unbind(2))
    check(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)


def test_keys_beyond_the_last_are_not_read():
    q, k, v = gpu_qkv(2, 1, 8, 128, Tk=1000, Hkv=2)
    expected = lk.flash_attention(q, k[:, :900].contiguous(), v[:, :900].contiguous())
    k[:, 900:], v[:, 900:] = torch.nan, torch.nan
    assert torch.equal(lk.flash_attention(q, k[:, :900], v[:, :900]), expected)


def test_large_scores():
    q, k, v = gpu_qkv(1, 1, 8, 128, Tk=3000, Hkv=2)
    q = 30 * q
    out, lse = lk.flash_attention(q, k, v, return_lse=True)
    exact, exact_lse = reference.flash_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("Hq", [4, 16])
@pytest.mark.parametrize("highest", [-60.0, 5.0, 60.0])
def test_rising_scores(highest, Hq, D):
    """By little from key to key, so that maxima are rarely raised; falling; by much."""
    q, k, v = gpu_qkv(1, 1, Hq, D, Tk=9000, Hkv=2)
    q[..., 0], k[..., 0] = D**0.5, torch.linspace(0, highest, 9000)[:, None].to(k)
    check(q, k, v)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("bits", [-1, 0x7FFF, -128, 0x7F80])
def test_nan_and_infinity_in_keys_and_values(bits, D):
    """All bits set is what the merge takes for a word that is not written yet."""
    q, k, v = gpu_qkv(1, 1, 8, D, Tk=3000, Hkv=2)
    for x in (k, v):
        x.view(torch.int16)[:, 1000:2000, 0] = bits
        out, lse = lk.flash_attention(q, k, v, return_lse=True)
        assert not out[:, :, :4].isfinite().any() and out[:, :, 4:].isfinite().all()
        assert lse[:, 4:].isfinite().all()


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("Tq", [1, 100])
def test_two_runs_are_bitwise_equal(Tq, D):
    q, k, v = gpu_qkv(3, Tq, 6, D, Tk=7777, Hkv=2)
    first = lk.flash_attention(q, k, v, return_lse=True)
    for _ in range(100):
        second = lk.flash_attention(q, k, v, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_runs_inside_a_cuda_graph():
    q, k, v = gpu_qkv(2, 1, 8, 128, Tk=4100, Hkv=2)
    eager = lk.flash_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lk.flash_attention(q, k, v)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, eager)


def test_two_streams_at_once():
    q, k, v = gpu_qkv(1, 1, 8, 128, Tk=20000, Hkv=2)
    eager = lk.flash_attention(q, k, v)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(lk.flash_attention(q, k, v))
    torch.cuda.synchronize()
    assert all(torch.equal(out, eager) for out in results)
