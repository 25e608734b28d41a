"""landmark_attention with few queries over many blocks, which splits the keys, on a Hopper GPU."""

import pytest
import torch
from gpu_checks import HALF, check_result, gpu_qkv, needs_kernel

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("landmark_fwd")


def check(q, k, v, block_size):
    with torch.no_grad():
        result = lk.landmark_attention(q, k, v, block_size=block_size, return_lse=True)
        exact = reference.landmark_attention(
            q.double(), k.double(), v.double(), block_size=block_size
        )
    check_result(result, exact, q, k, v)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("block_size", [2, 16, 17, 32, 51, 64, 100, 128])
@pytest.mark.parametrize("Tq", [1, 5])
def test_block_sizes(Tq, block_size, D):
    check(*gpu_qkv(2, Tq, 8, D, Tk=3001, Hkv=2), block_size)


@pytest.mark.parametrize("Tk", [1, 63, 64, 65, 130, 777, 4096, 5000])
@pytest.mark.parametrize("Tq", [1, 2, 16])
@pytest.mark.parametrize("block_size", [51, 64])
def test_lengths(block_size, Tq, Tk):
    check(*gpu_qkv(1, Tq, 8, 128, Tk=Tk, Hkv=2), block_size)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("group", [1, 3, 7, 8, 71])
def test_grouped_queries(group, dtype):
    check(*gpu_qkv(2, 1, 2 * group, 80, Tk=2000, Hkv=2, dtype=dtype), 64)


def test_many_batches():
    check(*gpu_qkv(40, 1, 8, 128, Tk=700, Hkv=8), 64)


def test_long_caches():
    check(*gpu_qkv(1, 1, 8, 128, Tk=65536, Hkv=2), 64)


def test_strided_caches():
    q, k, v = gpu_qkv(2, 2, 8, 128, Tk=2048, Hkv=4)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2)[:, :1500] for x in (k, v))
    check(q, k, v, 64)


def test_two_runs_are_bitwise_equal():
    q, k, v = gpu_qkv(3, 1, 6, 128, Tk=7777, Hkv=2)
    first = lk.landmark_attention(q, k, v, block_size=64, return_lse=True)
    for _ in range(100):
        second = lk.landmark_attention(q, k, v, block_size=64, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
