"""Gradients of landmark_attention on a Hopper GPU against its definition in fp64."""

import pytest
import torch
from gpu_checks import HALF, check_gradients, gpu_qkv, needs_kernel, rows_of_landmarks_and_long_gaps
from helpers import assert_close_to_reference, errors, random_landmarks

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("landmark_bwd")

deterministic = pytest.mark.parametrize("deterministic", [False, True])
BLOCK_SIZES = (2, 3, 16, 17, 32, 51, 64, 65, 100, 128, 256, 1000)


def check(q, k, v, block_size=None, is_landmark=None, **options):
    options |= {"block_size": block_size, "is_landmark": is_landmark}
    grads = check_gradients(lk.landmark_attention, reference.landmark_attention, q, k, v, **options)
    if block_size is not None:
        assert (grads["v"][:, block_size - 1 :: block_size] == 0).all()


def far_scores(block_size, D):
    """Sums of a block leave the range of fp32 here unless they are relative to its maximum."""
    q, k, v = gpu_qkv(1, 500, 2, D)
    k[:, block_size : 2 * block_size - 1] *= 8
    k[:, 3 * block_size - 1] *= 8
    return q, k, v


def check_beside_ordered(q, k, v, heads=slice(None), **options):
    """Errors of `heads` are at most the contract's multiples of those with deterministic=True."""
    dout = torch.randn_like(q)

    def grads(attention, tensors, dout, **more):
        leaves = [x.detach().requires_grad_() for x in tensors]
        result = attention(*leaves, **options, **more)
        out = result[0] if isinstance(result, tuple) else result
        return torch.autograd.grad(out, leaves, dout)

    fused, ordered = (
        grads(lk.landmark_attention, (q, k, v), dout, deterministic=d) for d in (False, True)
    )
    few = [x[:, :, heads].double() for x in (q, k, v, dout)]
    exact = grads(reference.landmark_attention, few[:3], few[3])
    for name, x, y, z in zip("qkv", fused, ordered, exact, strict=True):
        x, y = x[:, :, heads], y[:, :, heads]
        assert_close_to_reference(f"d{name}", x, z, errors(y, z))


@deterministic
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("block_size", [16, 51, 64, 100, 256])
def test_head_dimensions(block_size, D, dtype, deterministic):
    check(*gpu_qkv(2, 333, 4, D, Hkv=2, dtype=dtype), block_size, deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("T", [900, 896, 1024])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(block_size, T, D, deterministic):
    check(*gpu_qkv(1, T, 2, D), block_size, deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(
    ("Tq", "Tk"), [(1, 1), (1, 2), (1, 777), (63, 63), (129, 1000), (300, 129), (16, 1020)]
)
@pytest.mark.parametrize("block_size", [2, 51, 64, 200])
def test_lengths(block_size, Tq, Tk, D, deterministic):
    check(*gpu_qkv(1, Tq, 2, D, Tk=Tk), block_size, deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("Hkv", [1, 2, 8])
@pytest.mark.parametrize("D", [128, 256])
@pytest.mark.parametrize("block_size", [64, 200])
def test_grouped_queries(block_size, D, Hkv, deterministic):
    check(*gpu_qkv(2, 300, 8, D, Hkv=Hkv), block_size, deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.02, 0.2, 0.7, 1.0])
def test_irregular_landmarks(density, D, deterministic):
    for Tq, Tk in ((700, 700), (90, 500), (200, 150)):
        is_landmark = random_landmarks(2, Tk, density).cuda()
        options = {"is_landmark": is_landmark, "deterministic": deterministic}
        check(*gpu_qkv(2, Tq, 4, D, Tk=Tk, Hkv=2), **options)


@deterministic
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("block_size", [32, 51, 64])
def test_scores_far_from_those_of_the_landmarks(block_size, D, deterministic):
    q, k, v = far_scores(block_size, D)
    check(q, k, v, block_size, scale=1.0, deterministic=deterministic)


@pytest.mark.parametrize("D", [64, 128])
def test_far_scores_of_several_blocks_in_a_tile(D):
    """Rounding of the weights alone, in either order of sums, is beyond dense errors here."""
    check_beside_ordered(*far_scores(16, D), block_size=16, scale=1.0)


@pytest.mark.parametrize("D", [128, 256])
def test_rows_of_landmarks_and_long_gaps(D):
    check(*gpu_qkv(3, 1500, 2, D), is_landmark=rows_of_landmarks_and_long_gaps())


@pytest.mark.parametrize("irregular", [False, True])
def test_empty_tensors(irregular):
    for B, Tq, Tk in ((0, 5, 5), (2, 0, 5), (2, 0, 0)):
        q, k, v = (x.requires_grad_() for x in gpu_qkv(B, Tq, 4, 64, Tk=Tk))
        places = {"is_landmark": torch.arange(Tk, device="cuda").expand(B, Tk) % 3 == 2}
        options = places if irregular else {"block_size": 3}
        lk.landmark_attention(q, k, v, **options).sum().backward()
        for x in (q, k, v):
            assert x.grad.shape == x.shape and (x.grad == 0).all()


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("block_size", [51, 64, 256, None])
def test_same_bits_every_time(block_size, D):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(2, 1500, 8, D, Hkv=2))
    places = (torch.arange(1500, device="cuda") % 37 == 5).expand(2, -1)
    where = {"block_size": block_size} if block_size else {"is_landmark": places}
    dout = torch.randn_like(q)

    def grads():
        out = lk.landmark_attention(q, k, v, deterministic=True, **where)
        return torch.autograd.grad(out, (q, k, v), dout)

    first = grads()
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(grads(), first, strict=True))


def test_heads_in_chunks():
    """The statistics of all heads together are beyond the bound on them."""
    q, k, v = (x.requires_grad_() for x in gpu_qkv(1, 16384, 48, 64, Hkv=12))
    dout = torch.randn_like(q)
    options = {"block_size": 64, "deterministic": True}
    out = lk.landmark_attention(q, k, v, **options)
    together = torch.autograd.grad(out, (q, k, v), dout)
    for h in (0, 7, 11):
        own, heads = slice(h, h + 1), slice(4 * h, 4 * h + 4)
        few = q[:, :, heads], k[:, :, own], v[:, :, own]
        alone = torch.autograd.grad(lk.landmark_attention(*few, **options), few, dout[:, :, heads])
        for x, y, part in zip(together, alone, (heads, own, own), strict=True):
            assert torch.equal(x[:, :, part], y)


def test_blocks_in_chunks():
    """More blocks than have statistics at a time, and a long one where the first chunk ends."""
    is_landmark = torch.zeros(1, 4096, dtype=torch.bool, device="cuda")
    is_landmark[0, 1:1361:2] = True
    is_landmark[0, 2060::50] = True
    q, k, v = gpu_qkv(1, 4096, 32, 64)
    check_beside_ordered(q, k, v, slice(0, None, 31), is_landmark=is_landmark)
