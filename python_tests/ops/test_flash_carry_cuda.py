"""lctx::flash_carry, one step of a ring, against the dense definition in fp64."""

import pytest
import torch
from gpu_checks import HALF, check_result, gpu_qkv, needs_kernel
from helpers import random_tensor

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


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T, far, first_row", [(500, 300, 0), (500, 176, 250), (640, 4500, 256)])
@pytest.mark.parametrize("final", [1.0, 0.5, 0.0])
def test_own_and_far_keys_together(final, T, far, first_row, causal, D, dtype):
    """Some rows see far keys; some are done, some carried."""
    q, k, v = gpu_qkv(2, T, 4, D, Hkv=2, dtype=dtype)
    far_k, far_v = gpu_qkv(2, far, 2, D, dtype=dtype, seed=7)[1:]
    done = int(final * T)
    carry = q.new_full(q.shape, torch.nan, dtype=torch.float32)
    lse = q.new_full((2, 4, T), torch.nan, dtype=torch.float32)
    out = torch.full_like(q, torch.nan)
    arguments = (q, k, v, far_k, far_v, carry, lse, out, causal, D**-0.5, first_row, done)
    torch.ops.lctx.flash_carry_two(*arguments)
    out[:, done:] = carry[:, done:].to(dtype)
    exact_out, exact_lse = [], []
    for rows, keys, values in (
        (slice(0, first_row), k, v),
        (slice(first_row, T), torch.cat([far_k, k], 1), torch.cat([far_v, v], 1)),
    ):
        if rows.stop == rows.start:
            continue
        keys = keys[:, : keys.shape[1] - (T - rows.stop if causal else 0)]
        values = values[:, : keys.shape[1]]
        piece = (x.double() for x in (q[:, rows], keys, values))
        result = reference.flash_attention(*piece, causal=causal)
        exact_out.append(result[0])
        exact_lse.append(result[1])
    exact = torch.cat(exact_out, 1), torch.cat(exact_lse, 2)
    check_result((out, lse), exact, q, torch.cat([far_k, k], 1), torch.cat([far_v, v], 1))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [40, 64, 128, 256])
@pytest.mark.parametrize(
    "B, Tq, Hq, Hkv, Tk, causal, window",
    [
        (1, 1, 8, 2, 5000, False, 0),
        (2, 1, 4, 4, 100, True, 0),
        (1, 3, 16, 2, 4097, True, 0),
        (1, 40, 4, 4, 3000, True, 700),
        (1, 200, 2, 1, 6000, False, 0),
        (40, 1, 8, 4, 300, True, 0),
        (1, 5, 64, 1, 77, True, 0),
    ],
)
def test_first_steps_of_few_rows(B, Tq, Hq, Hkv, Tk, causal, window, D, dtype):
    """Their keys are split; what is carried is fp32, and a second step goes on from it."""
    q, k, v = gpu_qkv(B, Tq, Hq, D, Hkv=Hkv, Tk=Tk, dtype=dtype)
    carry = q.new_full(q.shape, torch.nan, dtype=torch.float32)
    lse = q.new_full((B, Hq, Tq), torch.nan, dtype=torch.float32)
    mask = (causal, D**-0.5, window, Tk - Tq)
    torch.ops.lctx.flash_carry(q, k, v, carry, lse, *mask, 0, False, True)
    options = {"causal": causal, "window": window or None}
    exact = reference.flash_attention(q.double(), k.double(), v.double(), **options)
    check_result((carry.to(dtype), lse), exact, q, k, v)
    rounding = (carry.to(dtype).double() - carry.double()).norm() / carry.double().norm()
    assert rounding > torch.finfo(dtype).eps / 8  # it has not been rounded before
    more_k, more_v = gpu_qkv(B, Tq, Hq, D, Hkv=Hkv, Tk=64, dtype=dtype, seed=5)[1:]
    out = torch.ops.lctx.flash_carry(
        q, more_k, more_v, carry, lse, False, D**-0.5, 0, 0, 0, True
    )  # fmt: skip
    both = reference.merge_attention(
        *exact, *reference.flash_attention(q.double(), more_k.double(), more_v.double(),
                                           causal=False)
    )  # fmt: skip
    check_result((out, lse), both, q, torch.cat([k, more_k], 1), torch.cat([v, more_v], 1))


def test_rows_without_keys_keep_nothing():
    q, k, v = gpu_qkv(1, 64, 2, 64)
    carry = q.new_full(q.shape, torch.nan, dtype=torch.float32)
    lse = q.new_full((1, 2, 64), -torch.inf, dtype=torch.float32)
    arguments = (q, k, v, carry, lse, True, 0.125, 0, 0, 1000)
    torch.ops.lctx.flash_carry(*arguments, False)
    assert (carry == 0).all() and (lse == -torch.inf).all()
    out = torch.ops.lctx.flash_carry(*arguments, True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("D", [64, 128, 256])
def test_same_bits_from_run_to_run(D):
    """Two steps of a ring forward, one after the other and together, and backward."""
    q, k, v = gpu_qkv(2, 1500, 4, D, Hkv=2)
    far_k, far_v = gpu_qkv(2, 700, 2, D, seed=7)[1:]
    dout, options = gpu_qkv(2, 1500, 4, D, seed=9)[0], (True, D**-0.5, 0, 700, 0)

    def forward():
        carry = torch.empty_like(q, dtype=torch.float32)
        lse = q.new_empty(2, 4, 1500, dtype=torch.float32)
        torch.ops.lctx.flash_carry(q, far_k, far_v, carry, lse, *options, False, True)
        out = torch.ops.lctx.flash_carry(q, k, v, carry, lse, *options[:3], 0, 0, True)
        both, both_lse = torch.empty_like(q), torch.empty_like(lse)
        torch.ops.lctx.flash_carry_two(
            q, k, v, far_k, far_v, carry, both_lse, both, True, D**-0.5, 0, 1500
        )
        return out, lse, both, both_lse

    def backward(out, lse):
        sums = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v, far_k, far_v)]
        delta = torch.ops.lctx.attn_delta(dout, None, out)
        common, mask = (lse, delta, sums[0]), (True, D**-0.5, 0)
        torch.ops.lctx.flash_carry_bwd(dout, q, k, v, *common, *sums[1:3], *mask, 0, 0, True, True)
        torch.ops.lctx.flash_carry_bwd(
            dout, q, far_k, far_v, *common, *sums[3:], *mask, 700, 0, True, True
        )
        return sums

    def run():
        results = forward()
        return *results, *backward(*results[:2])

    first = run()
    for _ in range(100):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("Dk, Dv", [(8, 8), (64, 128), (128, 128), (256, 80)])
@pytest.mark.parametrize("B, rows, heads, begin", [(1, 0, 3, 0), (2, 40, 3, 0), (2, 33, 2, 7)])
def test_sums_and_what_came_home(B, rows, heads, begin, Dk, Dv, dtype):
    """The bits of torch, in some heads of larger tensors and in all of them."""
    sums, homes, outs, expected = [], [], [], []
    for i, D in enumerate((Dk, Dv)):
        x = random_tensor(B, 40, 3, D, dtype=torch.float32, seed=i).cuda()[:, :, :heads]
        more = random_tensor(B, rows, heads, D, dtype=torch.float32, seed=2 + i).cuda()
        want = x.clone()
        want[:, begin : begin + rows] += more
        sums.append(x)
        homes.append(more if rows else None)
        outs.append(torch.full((B, 40, 3, D), torch.nan, dtype=dtype, device="cuda"))
        expected.append(want.to(dtype))
    parts = [out[:, :, :heads] for out in outs]
    torch.ops.lctx.carry_bwd_keys(*sums, *homes, begin, *parts)
    for part, out, want in zip(parts, outs, expected, strict=True):
        assert torch.equal(part, want) and out[:, :, heads:].isnan().all()


def test_sums_that_do_not_fit_are_refused():
    out = torch.empty(1, 8, 2, 16, dtype=torch.bfloat16, device="cuda")
    x = out.float()
    for arguments, problem in (
        ((x, x, x[:, :4], x[:, :4], 5, out, out), "home has rows 5 to 9"),
        ((x, x, x[:, :4], None, 0, out, out), "of k and v alike"),
        ((x, x[:, :4], None, None, 0, out, out), "dv"),
        ((x, out, None, None, 0, out, out), "dv"),
        ((x[..., 1:9], x, None, None, 0, out[..., :8], out), "dk"),
    ):
        with pytest.raises(ValueError, match=problem):
            torch.ops.lctx.carry_bwd_keys(*arguments)


def test_bad_arguments_are_refused():
    q, k, v = gpu_qkv(1, 64, 2, 64)
    carry, lse = torch.zeros_like(q, dtype=torch.float32), q.new_zeros(1, 2, 64).float()
    with pytest.raises(ValueError, match="carry_out"):
        torch.ops.lctx.flash_carry(q, k, v, q, lse, True, 0.125, 0, 0, 0, True)
    with pytest.raises(ValueError, match="lse"):
        torch.ops.lctx.flash_carry(q, k, v, carry, lse[:, :1], True, 0.125, 0, 0, 0, True)
    with pytest.raises(ValueError, match="positions apart"):
        torch.ops.lctx.flash_carry(q, k, v, carry, lse, True, 0.125, 0, 2**40, 0, True)
    two = (q, k, v, k, v, carry, lse, q, True, 0.125)
    for numbers, message in (((64, 64), "first_row"), ((0, 65), "final_rows")):
        with pytest.raises(ValueError, match=message):
            torch.ops.lctx.flash_carry_two(*two, *numbers)
