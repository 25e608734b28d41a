"""lctx::flash_carry, one step of a ring, against the dense definition in fp64."""

import pytest
import torch
from gpu_checks import HALF, check_result, gpu_qkv, needs_kernel

from lctx_kernels import reference

pytestmark = needs_kernel("flash_fwd")


def ring(q, k, v, bounds, order, *, causal, window=0, query_start=0):
    """Attention of q over the pieces of k, v that `bounds` cut, taken in `order`."""
    B, T, H, D = q.shape
    carry = q.new_full((B, T, H, D), torch.nan, dtype=torch.float32)
    says_first = order[0] % 2 == 0  # else lse says it
    unread = torch.nan if says_first else -torch.inf
    lse = q.new_full((B, H, T), unread, dtype=torch.float32)
    for step, piece in enumerate(order):
        begin, end = bounds[piece], bounds[piece + 1]
        out = torch.ops.lctx.flash_carry(
            q, k[:, begin:end], v[:, begin:end], carry, lse, causal, D**-0.5, window,
            query_start, begin, step == len(order) - 1, says_first and step == 0,
        )  # fmt: skip
        assert step == len(order) - 1 or out.numel() == 0
    return out, lse


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [40, 64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", [[0], [0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_pieces_make_the_whole(order, causal, D, dtype):
    q, k, v = gpu_qkv(2, 500, 4, D, Hkv=2, dtype=dtype)
    bounds = [0, 500] if len(order) == 1 else [0, 130, 256, 257, 500]
    exact = reference.flash_attention(q.double(), k.double(), v.double(), causal=causal)
    check_result(ring(q, k, v, bounds, order, causal=causal), exact, q, k, v)


@pytest.mark.parametrize("D", [64, 128])
def test_positions(D):
    """A rank's own queries: rows 200..499 of 500, all keys in four pieces."""
    q, k, v = gpu_qkv(1, 300, 4, D, Tk=500)
    exact = reference.flash_attention(q.double(), k.double(), v.double())
    result = ring(q, k, v, [0, 100, 200, 300, 500], [1, 2, 3, 0], causal=True, query_start=200)
    check_result(result, exact, q, k, v)


def test_window():
    q, k, v = gpu_qkv(1, 600, 2, 128)
    exact = reference.flash_attention(q.double(), k.double(), v.double(), window=70)
    result = ring(q, k, v, [0, 200, 400, 600], [2, 0, 1], causal=True, window=70)
    check_result(result, exact, q, k, v)


def test_rows_without_keys_keep_nothing():
    q, k, v = gpu_qkv(1, 64, 2, 64)
    carry = q.new_full(q.shape, torch.nan, dtype=torch.float32)
    lse = q.new_full((1, 2, 64), -torch.inf, dtype=torch.float32)
    arguments = (q, k, v, carry, lse, True, 0.125, 0, 0, 1000)
    torch.ops.lctx.flash_carry(*arguments, False)
    assert (carry == 0).all() and (lse == -torch.inf).all()
    out = torch.ops.lctx.flash_carry(*arguments, True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_bad_arguments_are_refused():
    q, k, v = gpu_qkv(1, 64, 2, 64)
    carry, lse = torch.zeros_like(q, dtype=torch.float32), q.new_zeros(1, 2, 64).float()
    with pytest.raises(ValueError, match="carry_out"):
        torch.ops.lctx.flash_carry(q, k, v, q, lse, True, 0.125, 0, 0, 0, True)
    with pytest.raises(ValueError, match="lse"):
        torch.ops.lctx.flash_carry(q, k, v, carry, lse[:, :1], True, 0.125, 0, 0, 0, True)
    with pytest.raises(ValueError, match="positions apart"):
        torch.ops.lctx.flash_carry(q, k, v, carry, lse, True, 0.125, 0, 2**40, 0, True)
