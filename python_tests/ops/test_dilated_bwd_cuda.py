"""The gradients of dilated_attention on a Hopper GPU, with and without a fixed order of sums."""

import pytest
import torch
from gpu_checks import HALF, check_gradients, gpu_qkv, needs_kernel

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("dilated_bwd")
deterministic = pytest.mark.parametrize("deterministic", [False, True])
mixtures = pytest.mark.parametrize("mix_grad", ["exact", "detached"])


def check(q, k, v, lengths, rates, **options):
    branches = {"segment_lengths": lengths, "dilation_rates": rates}
    return check_gradients(
        lk.dilated_attention, reference.dilated_attention, q, k, v, **branches, **options
    )


@deterministic
@mixtures
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dimensions(D, causal, dtype, mix_grad, deterministic):
    q, k, v = gpu_qkv(2, 500, 4, D, Hkv=2, dtype=dtype)
    options = {"causal": causal, "mix_grad": mix_grad, "deterministic": deterministic}
    check(q, k, v, [128, 256, 500], [1, 2, 4], **options)


@deterministic
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("head_offset", ["mod", "block"])
@pytest.mark.parametrize(
    ("lengths", "rates"),
    [
        ([300], [1]),
        ([300], [3]),  # two thirds of the rows are covered by no branch
        ([64, 700], [2, 5]),  # neither covers all rows, segments end in the middle of a step
        ([7, 1000], [1, 3]),
        ([50, 200, 1000], [1, 4, 6]),  # rates that do not divide each other
        ([10], [100]),  # most heads select nothing
        ([2000, 33], [1, 1]),
        ([1000, 1000], [7, 2]),
        ([600, 600, 600], [600, 601, 1]),
    ],
)
def test_branches(lengths, rates, head_offset, D, deterministic):
    options = {"head_offset": head_offset, "deterministic": deterministic}
    check(*gpu_qkv(1, 1000, 6, D, Hkv=3), lengths, rates, **options)


@mixtures
@deterministic
@pytest.mark.parametrize("T", [1, 2, 63, 255, 257, 1025])
def test_lengths(T, deterministic, mix_grad):
    options = {"mix_grad": mix_grad, "deterministic": deterministic}
    check(*gpu_qkv(2, T, 4, 64), [256, 1024], [1, 4], **options)
    check(*gpu_qkv(2, T, 4, 64), [256, 1024], [2, 4], **options)


@mixtures
@deterministic
@pytest.mark.parametrize("rates", [(1, 2), (2, 3)])
def test_true_lengths(rates, deterministic, mix_grad):
    q, k, v = gpu_qkv(4, 400, 4, 64)
    seqlens = torch.tensor([400, 0, 1, 257], dtype=torch.int32, device="cuda")
    options = {"mix_grad": mix_grad, "deterministic": deterministic}
    grads = check(q, k, v, [128, 300], rates, seqlens=seqlens, **options)
    assert all((x[3, 257:] == 0).all() for x in grads.values())


@deterministic
@pytest.mark.parametrize("head_offset", ["mod", "block"])
@pytest.mark.parametrize("Hkv", [1, 2, 3, 12])
def test_grouped_queries(Hkv, head_offset, deterministic):
    options = {"head_offset": head_offset, "deterministic": deterministic}
    check(*gpu_qkv(1, 700, 12, 64, Hkv=Hkv), [200, 400, 700], [1, 3, 8], **options)


@mixtures
@pytest.mark.parametrize("D", [64, 128, 256])
def test_same_bits_from_run_to_run(D, mix_grad):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(2, 1500, 4, D, Hkv=2))
    out = lk.dilated_attention(
        q, k, v, [256, 600, 1500], [1, 2, 4], mix_grad=mix_grad, deterministic=True
    )
    dout = torch.randn_like(out)
    first, *others = (
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(100)
    )
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_long_sequences_equal_their_parts():
    """Sums of a gigabyte are made one span of whole segments after the other.

    The last part is long enough for the forward to take the same tiles as for whole segments.
    """
    shape, like = (1, 2 * 32768 + 20000, 16, 128), {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(shape, **like, requires_grad=True) for _ in range(3))
    branches, dout = ([16384, 32768], [1, 2]), torch.randn_like(q)

    def grads(part):
        leaves = [x[:, part] for x in (q, k, v)]
        out = lk.dilated_attention(*leaves, *branches, deterministic=True)
        return torch.autograd.grad(out, leaves, dout[:, part])

    whole = grads(slice(None))
    for begin in range(0, q.shape[1], 32768):
        part = slice(begin, begin + 32768)
        assert all(torch.equal(x[:, part], y) for x, y in zip(whole, grads(part), strict=True))


@deterministic
def test_empty_tensors(deterministic):
    for B, T in ((0, 5), (2, 0)):
        q, k, v = (x.requires_grad_() for x in gpu_qkv(B, T, 4, 64))
        lk.dilated_attention(q, k, v, [4], [2], deterministic=deterministic).sum().backward()
        assert all(x.grad.shape == x.shape for x in (q, k, v))
