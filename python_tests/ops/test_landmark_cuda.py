"""landmark_attention on a Hopper GPU against its definition in fp64."""

import pytest
import torch
from gpu_checks import HALF, check_result, gpu_qkv, needs_kernel, rows_of_landmarks_and_long_gaps
from helpers import random_landmarks

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("landmark_fwd")

BLOCK_SIZES = (2, 3, 16, 17, 51, 64, 100, 128, 129, 256, 1000)


def check(q, k, v, block_size=None, is_landmark=None, **options):
    options |= {"block_size": block_size, "is_landmark": is_landmark}
    with torch.no_grad():
        result = lk.landmark_attention(q, k, v, return_lse=True, **options)
        exact = reference.landmark_attention(q.double(), k.double(), v.double(), **options)
    check_result(result, exact, q, k, v)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 128, 136, 256])
@pytest.mark.parametrize("block_size", [16, 51, 64, 100, 256])
def test_head_dimensions(block_size, D, dtype):
    check(*gpu_qkv(2, 333, 4, D, Hkv=2, dtype=dtype), block_size)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("T", [900, 896, 1024])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(block_size, T, D):
    check(*gpu_qkv(1, T, 2, D), block_size)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(
    ("Tq", "Tk"), [(1, 1), (1, 2), (1, 777), (63, 63), (129, 1000), (300, 129), (16, 1020)]
)
@pytest.mark.parametrize("block_size", [2, 51, 64, 200])
def test_lengths(block_size, Tq, Tk, D):
    check(*gpu_qkv(1, Tq, 2, D, Tk=Tk), block_size)


@pytest.mark.parametrize("Hkv", [1, 2, 8])
@pytest.mark.parametrize("block_size", [64, 200])
def test_grouped_queries(block_size, Hkv):
    check(*gpu_qkv(2, 300, 8, 128, Hkv=Hkv), block_size)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.02, 0.2, 0.7, 1.0])
def test_irregular_landmarks(density, D):
    for Tq, Tk in ((700, 700), (90, 500), (200, 150)):
        is_landmark = random_landmarks(2, Tk, density).cuda()
        check(*gpu_qkv(2, Tq, 4, D, Tk=Tk, Hkv=2), is_landmark=is_landmark)


def test_rows_of_landmarks_and_long_gaps():
    check(*gpu_qkv(3, 1500, 2, 128), is_landmark=rows_of_landmarks_and_long_gaps())


@pytest.mark.parametrize("block_size", [51, 64, 256])
def test_places_of_uniform_blocks_give_the_same(block_size):
    q, k, v = gpu_qkv(2, 700, 2, 64)
    is_landmark = (torch.arange(1, 701, device="cuda") % block_size == 0).expand(2, 700)
    out = lk.landmark_attention(q, k, v, block_size=block_size)
    same = lk.landmark_attention(q, k, v, is_landmark=is_landmark)
    torch.testing.assert_close(same, out, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("block_size", [16, 64, 200])
def test_scores_of_any_size(block_size):
    """Blocks whose scores lie far below or above those of the others."""
    q, k, v = gpu_qkv(1, 700, 2, 64)
    k = k * torch.randint(0, 60, (1, 700, 1, 1), device="cuda") * (2 - k[..., :1].sign())
    doubles = (x.double() for x in (q, k, v))
    with torch.no_grad():
        out, lse = lk.landmark_attention(q, k, v, block_size=block_size, return_lse=True)
        exact = reference.landmark_attention(*doubles, block_size=block_size)
    torch.testing.assert_close(out.double(), exact[0].double(), rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("block_size", [51, 200])
def test_strided_views(block_size, D):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in gpu_qkv(2, 257, 4, D))
    check(q, k, v, block_size)
    packed = torch.stack(gpu_qkv(2, 257, 4, D), dim=2)
    check(*packed.unbind(2), block_size)


def test_empty_tensors():
    for B, Tq, Tk in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        q, k, v = gpu_qkv(B, Tq, 4, 64, Tk=Tk)
        for options in (
            {"block_size": 3},
            {"block_size": 300},
            {"is_landmark": random_landmarks(B, Tk, 0.5).cuda()},
        ):
            out, lse = lk.landmark_attention(q, k, v, return_lse=True, **options)
            assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("block_size", [51, 64, 128, 300])
def test_two_runs_are_bitwise_equal(block_size, D):
    q, k, v = gpu_qkv(3, 1111, 6, D, Hkv=2)
    first = lk.landmark_attention(q, k, v, block_size=block_size, return_lse=True)
    for _ in range(5):
        again = lk.landmark_attention(q, k, v, block_size=block_size, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_every_element_is_written(poisoned_memory):
    q, k, v = gpu_qkv(2, 515, 2, 128)
    for options in (
        {"block_size": 51},
        {"block_size": 64},
        {"block_size": 300},
        {"is_landmark": random_landmarks(2, 515, 0.1).cuda()},
    ):
        check(q, k, v, **options)


@pytest.mark.parametrize("block_size", [64, 300, None])
def test_runs_inside_a_cuda_graph(block_size):
    q, k, v = gpu_qkv(2, 640, 4, 128)
    is_landmark = random_landmarks(2, 640, 0.1).cuda() if block_size is None else None
    options = {"block_size": block_size, "is_landmark": is_landmark}
    eager = lk.landmark_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lk.landmark_attention(q, k, v, **options)
    out.zero_()
    for _ in range(3):
        graph.replay()
    assert torch.equal(out, eager)


def test_refusals():
    q, k, v = gpu_qkv(1, 64, 2, 64)
    with pytest.raises(NotImplementedError, match="on a GPU; expected"):
        lk.landmark_attention(q.float(), k.float(), v.float(), block_size=16)


def test_opcheck():
    q, k, v = gpu_qkv(1, 130, 4, 64, Hkv=2)
    torch.library.opcheck(
        torch.ops.lctx.landmark_fwd.default, (q, k, v, None, 51, 0.125, False),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
