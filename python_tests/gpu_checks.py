"""What the GPU tests of all ops share: tensors, PyTorch's own errors, the comparison with fp64."""

import pytest
import torch
from helpers import assert_close_to_reference, errors, random_qkv, random_tensor, worse
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lctx_kernels import _ops, reference

HALF = (torch.bfloat16, torch.float16)
LSE_TOLERANCE = {"rtol": 1e-6, "atol": 4e-6}  # the approximate exp2 adds to the rounding of fp32
# cuDNN makes a plan for every new shape, which takes longer than the test.
QUICK_TO_START = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def needs_kernel(op):
    """Marks of a module whose tests run `lctx::op` on a GPU."""
    built = "cuda" in _ops.KERNELS.get(op, ())
    return [pytest.mark.cuda, pytest.mark.skipif(not built, reason=f"built without a CUDA {op}")]


def gpu_qkv(*args, dtype=torch.bfloat16, **kwargs):
    return [x.cuda() for x in random_qkv(*args, dtype=dtype, **kwargs)]


def rows_of_landmarks_and_long_gaps():
    """(3, 1500) bool: landmarks side by side, and far apart."""
    is_landmark = torch.zeros(3, 1500, dtype=torch.bool, device="cuda")
    is_landmark[0, :9] = True
    is_landmark[1, 700:708] = True
    is_landmark[2, [100, 101, 356, 1498, 1499]] = True
    return is_landmark


def exact_attention(q, k, v, *, causal=False, scale=None):
    """Dense attention in fp64, a few rows at a time: their scores take 128 MiB at most."""
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    k, v = k.double(), v.double()
    step = max((1 << 24) // max(B * H * Tk, 1), 1)
    pieces = [q.new_zeros(B, 0, H, v.shape[-1], dtype=torch.float64)]
    for begin in range(0, Tq, step):
        end = min(begin + step, Tq)
        seen = max(Tk - Tq + end, 0) if causal else Tk
        rows, keys, values = q[:, begin:end].double(), k[:, :seen], v[:, :seen]
        pieces.append(reference.flash_attention(rows, keys, values, causal=causal, scale=scale)[0])
    return torch.cat(pieces, 1)


def baseline(q, k, v, *, causal=False, scale=None):
    """Errors of PyTorch's own attention, dense, in the dtype of q."""
    exact = exact_attention(q, k, v, causal=causal, scale=scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(QUICK_TO_START):
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=True
        )
    return errors(out.transpose(1, 2), exact)


def gradient_baseline(q, k, v, dout, *, causal=False, scale=None):
    """Errors of the gradients of PyTorch's own attention, dense, in the dtype of q, by name."""

    def grads(q, k, v):
        leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(QUICK_TO_START):
            out = functional.scaled_dot_product_attention(
                *leaves, is_causal=causal, scale=scale, enable_gqa=True
            )
        given = dout.to(out.dtype).transpose(1, 2)
        return [x.transpose(1, 2) for x in torch.autograd.grad(out, leaves, given)]

    theirs, exact = grads(q, k, v), grads(q.double(), k.double(), v.double())
    return {n: errors(x, y) for n, x, y in zip("qkv", theirs, exact, strict=True)}


def _at_least_64_rows(*tensors):
    """The same with more random rows behind them: few are no measure."""
    missing = 64 - tensors[0].shape[1]
    if missing <= 0:
        return tensors
    shapes = [(x.shape[0], missing, *x.shape[2:]) for x in tensors]
    more = [random_tensor(*s, seed=60 + n) for n, s in enumerate(shapes)]
    return [torch.cat([x, y.to(x)], 1) for x, y in zip(tensors, more, strict=True)]


def _measured_gradients(q, k, v, dout, options):
    """PyTorch's errors for dense attention, causal and not, and for the keys of a window."""
    q, dout = _at_least_64_rows(q, dout)
    scale, window = options.get("scale"), options.get("window")
    n = min(q.shape[1], k.shape[1])
    lengths = {n, min(n, 2 * window)} if window else {n}
    found = gradient_baseline(q, k, v, dout, scale=scale)
    for n in lengths:
        some = [x[:, :n] for x in (q, k, v, dout)]
        for causal in (True, False):
            found = worse(found, gradient_baseline(*some, causal=causal, scale=scale))
    return found


def check_gradients(
    implementation, definition, q, k, v, *, wanted="qkv", deterministic=True, **options
):
    """Gradients through out alone and through out and lse; returns the last.

    wanted: inputs that get one. Multiples of 1/8 come in, exact in every dtype.
    """
    dout = (8 * random_tensor(*q.shape[:3], v.shape[-1], seed=40)).round().cuda() / 8
    dlse = random_tensor(q.shape[0], q.shape[2], q.shape[1], seed=41).cuda() / 4
    baseline = _measured_gradients(q, k, v, dout, options)

    def grads(function, tensors, upstream, **options):
        leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in tensors.items()}
        outputs = function(*leaves.values(), **options)
        pairs = list(zip(outputs, upstream, strict=False))
        pairs = [(x, g) for x, g in pairs if x.requires_grad]  # lse does not depend on v
        given = [g.to(x.dtype).masked_fill(x.isinf(), 0) for x, g in pairs]
        inputs = [leaves[n] for n in wanted]
        found = torch.autograd.grad([x for x, _ in pairs], inputs, given)
        return dict(zip(wanted, found, strict=True))

    tensors = dict(zip("qkv", (q, k, v), strict=True))
    for upstream in ([dout], [dout, dlse]):
        more = {"return_lse": True, "deterministic": deterministic}
        ours = grads(implementation, tensors, upstream, **more, **options)
        exact = grads(definition, {n: x.double() for n, x in tensors.items()}, upstream, **options)
        for n in wanted:
            assert ours[n].dtype == q.dtype and ours[n].is_contiguous()
            assert_close_to_reference(f"d{n}", ours[n], exact[n], baseline[n])
    return ours


def check_result(result, exact, q, k, v):
    """(out, lse) against the definition in fp64, within DESIGN's bounds relative to PyTorch."""
    out, lse = result
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    assert_close_to_reference("out", out, exact[0], baseline(q, k, v))
    torch.testing.assert_close(lse.double(), exact[1].double(), **LSE_TOLERANCE)
