"""Online softmax on fragments, merge weights, exp2, fast division, sums over lanes."""

import math

import pytest
import torch
from device.device_library import call, call_host, needs_gpu, needs_library

LOG2E = math.log2(math.e)


def gpu(test):
    for mark in needs_gpu:
        test = mark(test)
    return test


# ---- online softmax ----


def random_scores(N, blocks, magnitude):
    """Rows with every kind of mask: none, blocks at an end, scattered, all but one, all."""
    columns = blocks * N
    scores = torch.randn(64, columns, device="cuda") * magnitude
    scores[8:16, :N] = -math.inf
    scores[16:24, -N:] = -math.inf
    scores[24:32][torch.rand(8, columns, device="cuda") < 0.7] = -math.inf
    scores[32:40] = -math.inf
    scores[torch.arange(32, 40), torch.arange(8) * 5 % columns] = 3.0
    scores[40:44] = -math.inf
    scores[44:48] = 2.5  # all equal
    scores[48:52] = torch.linspace(-magnitude, magnitude, columns, device="cuda")  # growing maximum
    return scores


@gpu
@pytest.mark.parametrize("magnitude", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("N", [32, 64, 80, 96, 128, 176])
def test_online_softmax(N, blocks, magnitude):
    scale = 0.125
    scores = random_scores(N, blocks, magnitude)
    weights = torch.full_like(scores, torch.nan)
    alpha = torch.full((blocks, 64, 4), torch.nan, device="cuda")
    inverse, lse = torch.full((2, 64, 4), torch.nan, device="cuda")
    call("softmax", N, blocks, scale * LOG2E, scores, weights, alpha, inverse, lse)
    for x in (alpha, inverse, lse):
        assert (x == x[..., :1]).all()  # the threads of a row agree

    # Every block was weighed by the maximum so far; later blocks scale it down.
    later = alpha[:, :, 0].double().flip(0).cumprod(0).flip(0)
    later = torch.cat([later[1:], torch.ones_like(later[:1])])
    found = weights.double().view(64, blocks, N) * later.t()[:, :, None]
    found = found.flatten(1) * inverse[:, :1].double()
    logits = scores.double() * scale
    empty = (logits == -math.inf).all(1)
    exact = logits.softmax(1).masked_fill(empty[:, None], 0)
    # exp2 takes the difference of two rounded products.
    tolerance = 1e-6 + logits[~logits.isinf()].abs().max().item() * 2**-22
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=1e-9)
    torch.testing.assert_close(lse[:, 0].double(), logits.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert (inverse[empty] == 0).all()
    assert (weights[empty] == 0).all()


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_weights(dtype):
    values = [-math.inf, -1e30, -1e4, -200.0, -1.0, 0.0, 1e-3, 5.0, 88.0, 700.0, 1e30]
    values += torch.randn(50).tolist()
    x = torch.tensor(values, dtype=dtype, device="cuda")
    a, b = (v.contiguous().view(-1) for v in torch.meshgrid(x, x, indexing="ij"))
    found = torch.full((a.numel(), 3), torch.nan, dtype=dtype, device="cuda")
    call("merge_weights", dtype == torch.float64, a, b, found, a.numel())
    exact_a, exact_b = a.double(), b.double()
    none = exact_a.isinf() & exact_b.isinf()
    weight = (exact_a - exact_b).sigmoid().masked_fill(none, 0)
    other = (exact_b - exact_a).sigmoid().masked_fill(none, 0)
    exact = torch.stack([weight, other, torch.logaddexp(exact_a, exact_b)], 1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=8 * eps, atol=8 * eps)
    equal = found[(a == b) & ~none]
    assert (equal[:, :2] == 0.5).all()
    assert (found[none][:, :2] == 0).all()
    assert (found[exact_a.isinf() & ~none][:, :2] == torch.tensor([0, 1]).to(found)).all()


@gpu
def test_exp2():
    whole = torch.arange(-126.0, 128.0)
    x = torch.cat([whole, torch.tensor([-math.inf, -200.0, 128.0]), torch.randn(5000) * 40])
    x = x.cuda()
    y = torch.full_like(x, torch.nan)
    call("exp2", x, y, x.numel())
    assert torch.equal(y[: len(whole)].double(), whole.cuda().double().exp2())
    assert y[len(whole) : len(whole) + 3].tolist() == [0, 0, math.inf]
    exact = x.double().exp2().float()
    torch.testing.assert_close(y, exact, rtol=5e-7, atol=2e-38)  # less than 1.2e-38 is flushed to 0


# ---- small arithmetic ----

LAST = 2**31 - 1


def around(values):
    near = {v + step for v in values for step in (-1, 0, 1)}
    return sorted(v for v in near if 0 <= v <= LAST)


POWERS = [2**k for k in range(32)]
NUMBERS = around([*POWERS, *(3**k for k in range(20)), *(10**k for k in range(10)), LAST])
DIVISORS = sorted({*range(1, 3000), *around([*POWERS, LAST]), *range(3000, LAST, 9973 * 4001)})
DIVISORS = [d for d in DIVISORS if d > 0]


def divisors():
    """Triples of divisor, multiplier and shift, as FastDivisor computes them."""
    wanted = torch.tensor(DIVISORS, dtype=torch.int32)
    triples = torch.zeros(len(DIVISORS), 3, dtype=torch.int32)
    call_host("make_divisors", wanted, len(DIVISORS), triples)
    assert torch.equal(triples[:, 0], wanted)
    return triples


@needs_library
def test_fast_divisor_on_the_host():
    """The formula of FastDivisor::divide with its multipliers, in 64 bits."""
    n = torch.cat([torch.tensor(NUMBERS), torch.randint(LAST, (500,))])
    triples = divisors().long()
    d, multiplier, shift = triples[:, 0, None], triples[:, 1, None] % 2**32, triples[:, 2, None]
    n = torch.cat([n.expand(len(d), -1), n // d * d, (n // d * d - 1).clamp(min=0)], 1)
    total = (n * multiplier >> 32) + n
    assert total.max() < 2**32
    assert torch.equal(total >> shift, n // d)


@gpu
def test_fast_divisor():
    n = torch.cat([torch.tensor(NUMBERS), torch.randint(LAST, (3000,))]).int().cuda()
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    call("divide", divisors().cuda(), len(DIVISORS), n, n.numel(), counts)
    made, wrong = counts.tolist()
    assert wrong == 0
    assert made > 2 * len(DIVISORS) * n.numel()


@gpu
@pytest.mark.parametrize("block", [(128, 1, 1), (8, 16, 1), (4, 2, 16), (96, 1, 1)], ids=str)
@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
def test_sum_over_lanes(lanes, block):
    threads = math.prod(block)
    x = torch.randint(100, (threads,), device="cuda").float()
    sums = torch.full_like(x, torch.nan)
    call("lane_sum", x, sums, lanes, *block)
    expected = x.view(-1, lanes).sum(1, keepdim=True).expand(-1, lanes)
    assert torch.equal(sums.view(-1, lanes), expected)
