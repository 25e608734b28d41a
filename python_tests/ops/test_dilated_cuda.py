"""What dilated_attention alone promises on a Hopper GPU; test_common_cuda.py has the rest."""

import pytest
import torch
from gpu_checks import HALF, check_result, gpu_qkv, needs_kernel

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("dilated_fwd")


def check(q, k, v, lengths, rates, **options):
    with torch.no_grad():
        result = lk.dilated_attention(q, k, v, lengths, rates, return_lse=True, **options)
        exact = reference.dilated_attention(
            q.double(), k.double(), v.double(), lengths, rates, **options
        )
    check_result(result, exact, q, k, v)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dimensions(D, causal, dtype):
    q, k, v = gpu_qkv(2, 500, 4, D, Hkv=2, dtype=dtype)
    check(q, k, v, [128, 256, 500], [1, 2, 4], causal=causal)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_offset", ["mod", "block"])
@pytest.mark.parametrize(
    ("lengths", "rates"),
    [
        ([300], [1]),
        ([300], [3]),  # two thirds of the rows are covered by no branch
        ([64, 700], [2, 5]),  # neither covers all rows, segments end in the middle of a step
        ([7, 1000], [1, 3]),
        ([50, 200, 1000], [1, 4, 6]),
        ([10], [100]),  # most heads select nothing
        ([2000, 33], [1, 1]),
        ([1000, 1000], [7, 2]),
        ([600, 600, 600], [600, 601, 1]),
    ],
)
def test_branches(lengths, rates, head_offset, causal, D):
    check(*gpu_qkv(1, 1000, 6, D), lengths, rates, causal=causal, head_offset=head_offset)


@pytest.mark.parametrize("T", [1, 2, 63, 255, 257, 1025])
def test_lengths(T):
    check(*gpu_qkv(2, T, 4, 64), [256, 1024], [1, 4])
    check(*gpu_qkv(2, T, 4, 64), [256, 1024], [2, 4])


@pytest.mark.parametrize("rates", [(1, 2), (2, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_true_lengths(rates, causal):
    q, k, v = gpu_qkv(4, 400, 4, 64)
    seqlens = torch.tensor([400, 0, 1, 257], dtype=torch.int32, device="cuda")
    check(q, k, v, [128, 300], rates, seqlens=seqlens, causal=causal)


@pytest.mark.parametrize("Hkv", [1, 2, 8])
def test_grouped_queries(Hkv):
    check(*gpu_qkv(1, 700, 8, 64, Hkv=Hkv), [200, 700], [1, 4])


def test_long_branches_take_their_own_tile():
    check(*gpu_qkv(1, 9000, 1, 128), [2000, 9000], [2, 1])


def test_empty_tensors():
    q, k, v = gpu_qkv(1, 0, 4, 64)
    assert lk.dilated_attention(q, k, v, [4], [2]).shape == q.shape
