"""What the GPU tests of all ops share: tensors, PyTorch's own errors, the comparison with fp64."""

import pytest
import torch
from helpers import assert_close_to_reference, errors, random_qkv, random_tensor, run
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


def baseline(q, k, v, *, causal=False, scale=None):
    """Errors of PyTorch's own attention, dense, in the dtype of q."""
    exact, _ = reference.flash_attention(
        q.double(), k.double(), v.double(), causal=causal, scale=scale
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(QUICK_TO_START):
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=True
        )
    return errors(out.transpose(1, 2), exact)


def check_result(result, exact, q, k, v):
    """(out, lse) against the definition in fp64, within DESIGN's bounds relative to PyTorch."""
    out, lse = result
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32
    assert_close_to_reference("out", out, exact[0], baseline(q, k, v))
    torch.testing.assert_close(lse.double(), exact[1].double(), **LSE_TOLERANCE)


def gradient_baseline(q, k, v, dout, *, causal=False, scale=None):
    """Errors of the gradients of PyTorch's own attention, dense: "dq", "dk", "dv" -> Errors."""

    def dense(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        backends = QUICK_TO_START if q.dtype in HALF else [SDPBackend.MATH]
        with sdpa_kernel(backends):
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=scale, enable_gqa=True
            )
        return {"out": out.transpose(1, 2)}

    tensors = {"q": q, "k": k, "v": v}
    theirs = run(dense, tensors, {"out": dout})
    exact = run(dense, {n: x.double() for n, x in tensors.items()}, {"out": dout})
    return {n: errors(theirs[n], exact[n]) for n in ("dq", "dk", "dv")}


def check_gradients(function, definition, q, k, v, *, cotangents=None, measure=None):
    """Gradients of function(q, k, v) -> (out, lse), named, against fp64 of `definition`.

    cotangents: for "out" and, if it is to have one, "lse"; None: normal random numbers for both.
    """
    tensors = {"q": q, "k": k, "v": v}
    if cotangents is None:
        B, Tq, Hq, _ = q.shape
        cotangents = {
            "out": random_tensor(B, Tq, Hq, v.shape[-1], seed=7).to(q),
            "lse": random_tensor(B, Hq, Tq, seed=8).cuda().float(),
        }
    ours = run(function, tensors, cotangents)
    exact = run(definition, {n: x.double() for n, x in tensors.items()}, cotangents)
    measure = measure or gradient_baseline(q, k, v, cotangents["out"])
    for name, x in zip(("dq", "dk", "dv"), (q, k, v), strict=True):
        assert ours[name].dtype == x.dtype
        assert_close_to_reference(name, ours[name], exact[name], measure[name])
    return ours
