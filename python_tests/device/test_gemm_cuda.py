"""Warpgroup products (csrc/common/wgmma.cuh) against torch.matmul: integers, so bit for bit."""

import pytest
import torch
from device.device_library import HALF, call, integers, needs_gpu

pytestmark = needs_gpu
A_SHARED_K, A_SHARED_MN, A_REGISTERS = 0, 1, 2  # how A is stored; K: depth along its rows
B_K, B_MN = 0, 1
COLUMNS_BEFORE = 64  # an MN-major B has this many columns more than the product


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("major_b", [B_K, B_MN])
@pytest.mark.parametrize("source", [A_SHARED_K, A_SHARED_MN, A_REGISTERS])
@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize("N", [32, 48, 64, 80, 96, 128, 176, 256])
def test_product(N, depth, source, major_b, dtype):
    a = integers(128, depth, dtype=dtype)
    b = integers(depth, COLUMNS_BEFORE + N, dtype=dtype)
    stored_a = a.t().contiguous() if source == A_SHARED_MN else a
    for column0 in (0, COLUMNS_BEFORE) if major_b == B_MN else (0,):
        part = b[:, column0 : column0 + N]
        stored_b = b if major_b == B_MN else part.t().contiguous()
        product = a.float() @ part.float()
        for accumulate in (False, True):
            before = integers(128, N, high=1000) if accumulate else torch.zeros_like(product)
            d = before.clone() if accumulate else torch.full_like(product, torch.nan)
            args = (stored_a, stored_b, d, column0, accumulate)
            call("gemm", dtype, N, depth, source, major_b, *args)
            assert torch.equal(d, product + before), (column0, accumulate)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("depth", [48, 64, 80, 128, 176])
def test_accumulator_becomes_a(depth, dtype):
    """The products pick columns of A, so that every element of A is seen, rounded, alone."""
    s = torch.randn(64, depth, device="cuda")
    for first in range(0, depth, 64):
        picked = (torch.arange(64, device="cuda") * 7 + first) % depth
        b = torch.zeros(depth, 64, dtype=dtype, device="cuda")
        b[picked, torch.arange(64)] = 1
        d = torch.full((64, 64), torch.nan, device="cuda")
        call("chain", dtype, depth, s, b, d)
        assert torch.equal(d, s.to(dtype).float()[:, picked])
