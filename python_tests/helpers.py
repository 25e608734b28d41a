"""Measures, tolerances and inputs that all tests share.

The numerical contract: RMS(ours - exact) / RMS(exact) is at most 1.5 times, and the largest error
at most 2 times, what PyTorch's own attention shows for the dense computation in the same dtype.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from lctx_kernels import reference

RMS_FACTOR, MAX_FACTOR = 1.5, 2.0
FP64_BOUND = 1e-12
FEW = 256
HALF_DTYPES = (torch.bfloat16, torch.float16)
ALL_DTYPES = (torch.float64, torch.float32, *HALF_DTYPES)


class Errors(NamedTuple):
    """Error of a result relative to the RMS of the exact one, and that RMS."""

    rms: float
    max: float
    norm: float = 0.0


def stat_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def _finite_difference(ours, exact):
    """ours - exact in fp64, after checking shape and that both are -inf, inf at the same places."""
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    ours, exact = ours.detach().double(), exact.detach().double()
    assert not ours.isnan().any(), "NaN (perhaps an element that was never written)"
    infinite = exact.isinf()
    assert torch.equal(ours[ours.isinf() | infinite], exact[ours.isinf() | infinite]), (
        "infinite at other places than the exact result"
    )
    return (ours - exact).masked_fill(infinite, 0), exact.masked_fill(infinite, 0)


def _rms(x):
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def rms_error(ours, exact, norm=0.0):
    """RMS(ours - exact) / max(RMS(exact), norm)."""
    difference, exact = _finite_difference(ours, exact)
    return _rms(difference) / max(_rms(exact), norm, torch.finfo(torch.float64).tiny)


def max_error(ours, exact, norm=0.0):
    """max |ours - exact| / max(RMS(exact), norm)."""
    difference, exact = _finite_difference(ours, exact)
    largest = difference.abs().max().item() if difference.numel() else 0.0
    return largest / max(_rms(exact), norm, torch.finfo(torch.float64).tiny)


def errors(ours, exact, norm=0.0):
    rms = _rms(exact.double().masked_fill(exact.isinf(), 0))
    return Errors(rms_error(ours, exact, norm), max_error(ours, exact, norm), rms)


def worse(a, b):
    """The larger of two sets of errors, name by name."""
    nothing = Errors(0.0, 0.0)
    return {n: Errors(*map(max, a.get(n, nothing), b.get(n, nothing))) for n in a.keys() | b.keys()}


def assert_fp64_equal(name, ours, exact, bound=FP64_BOUND):
    """Equality of two fp64 results up to rounding."""
    assert ours.dtype == torch.float64, f"{name}: {ours.dtype}"
    difference, exact = _finite_difference(ours, exact)
    if difference.numel():
        worst = difference.abs().max().item()
        limit = bound * max(exact.abs().max().item(), 1.0)
        assert worst <= limit, f"{name}: largest difference {worst:.2e}, allowed {limit:.2e}"


def assert_close_to_reference(name, ours, ref64, baseline):
    """Check `ours` against the fp64 result by the numerical contract.

    baseline: errors of PyTorch's own attention, and the RMS of its exact result. Errors are
    relative to the RMS of the exact result or, where that is smaller because terms cancel, to that
    of dense attention. Where the exact result vanishes (dq and dk through a single key), only the
    rounding of a sum of terms of unit size is allowed. The baseline is never below the error of
    storing the exact result in the dtype of `ours`. A mean over few numbers is no measure: below
    256 of them the largest error alone counts.
    """
    if ours.dtype == torch.float64:
        return assert_fp64_equal(name, ours, ref64)
    difference, exact = _finite_difference(ours, ref64)
    if _rms(exact) < 1e-12:
        worst = difference.abs().max().item() if difference.numel() else 0.0
        limit = 64 * torch.finfo(stat_dtype(ours.dtype)).eps
        assert worst <= limit, f"{name}: exactly 0 expected, found {worst:.2e}"
        return None
    found = errors(ours, ref64, baseline.norm)
    stored = errors(ref64.to(ours.dtype), ref64, baseline.norm)
    for measure, factor in (("rms", RMS_FACTOR), ("max", MAX_FACTOR)):
        if measure == "rms" and ours.numel() < FEW:
            continue
        error = getattr(found, measure)
        limit = factor * max(getattr(baseline, measure), getattr(stored, measure))
        assert error <= limit, (
            f"{name} ({ours.dtype}): {measure} error {error:.3e} exceeds {limit:.3e} "
            f"(PyTorch {getattr(baseline, measure):.3e}, storage {getattr(stored, measure):.3e})"
        )
    return None


def random_tensor(*shape, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def random_qkv(B, Tq, Hq, Dk, *, Tk=None, Hkv=None, Dv=None, dtype=torch.float64, seed=0):
    """q (B, Tq, Hq, Dk), k (B, Tk, Hkv, Dk), v (B, Tk, Hkv, Dv), standard normal."""
    Tk, Hkv, Dv = Tq if Tk is None else Tk, Hkv or Hq, Dv or Dk
    shapes = ((B, Tq, Hq, Dk), (B, Tk, Hkv, Dk), (B, Tk, Hkv, Dv))
    return [random_tensor(*s, dtype=dtype, seed=3 * seed + n) for n, s in enumerate(shapes)]


def random_landmarks(B, T, density, seed=0):
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < density


def random_memory(B, Hkv, Dk, Dv, dtype=torch.float64, seed=0):
    """A memory (M, z) as a few earlier tokens would leave it."""
    keys = functional.elu(random_tensor(B, 5, Hkv, Dk, seed=seed + 100)) + 1
    M = torch.einsum("bthd,bthe->bhde", keys, random_tensor(B, 5, Hkv, Dv, seed=seed + 101))
    return M.to(stat_dtype(dtype)), keys.sum(1).to(stat_dtype(dtype))


def run(function, tensors, cotangents=None):
    """Outputs of function(**tensors) by name, and after backward the gradients as "d<name>".

    tensors: name -> tensor or None; floating tensors get a gradient, strides are kept.
    function returns name -> tensor. cotangents: name -> gradient of that output (None: normal
    random numbers, 0 for infinite entries); outputs without an entry get no gradient.
    """
    leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if x is not None}
    outputs = function(**{n: leaves.get(n) for n in tensors})
    if cotangents is None:
        cotangents = {n: random_tensor(*x.shape, seed=7) for n, x in outputs.items()}
    results = {n: x.detach() for n, x in outputs.items()}
    used = {n: x for n, x in outputs.items() if n in cotangents and x.requires_grad}
    grads = [None] * len(leaves)
    if used:
        upstream = [cotangents[n].to(x) for n, x in used.items()]
        inputs = list(leaves.values())
        grads = torch.autograd.grad(list(used.values()), inputs, upstream, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results["d" + name] = torch.zeros_like(leaf) if grad is None else grad
    return results


def sdpa_errors(q, k, v, dout, *, causal=True, scale=None, visible=None):
    """Errors of PyTorch's own attention on these tensors: result name -> Errors.

    visible: (B, Hq, Tq, Tk) bool instead of causal; a row without keys is given one. out, dq, dk,
    dv come from scaled_dot_product_attention; lse is that of PyTorch's CPU flash kernel where it
    runs (Tq = Tk or not causal, Dk = Dv), else of the definition in the dtype of q.
    """
    Tq, Tk = q.shape[1], k.shape[1]
    square = not causal or Tq == Tk
    if visible is None and not square:
        visible = torch.ones(Tq, Tk, dtype=torch.bool).tril(Tk - Tq)
    if visible is not None:
        visible = visible | (~visible.any(-1, keepdim=True) & (torch.arange(Tk) == 0))

    def dense(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        is_causal = causal and visible is None
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        return {"out": out.transpose(1, 2)}

    tensors = {"q": q, "k": k, "v": v}
    theirs = run(dense, tensors, {"out": dout})
    ref64 = run(dense, {n: x.double() for n, x in tensors.items()}, {"out": dout})
    options = {"causal": causal, "scale": scale}
    ref64["lse"] = reference.flash_attention(q.double(), k.double(), v.double(), **options)[1]
    theirs["lse"] = reference.flash_attention(q, k, v, **options)[1]
    if square and v.shape[-1] == q.shape[-1]:
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        theirs["lse"] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=scale
        )[1]
    return {n: errors(theirs[n], ref64[n]) for n in ref64}


def definition_errors(definition, tensors, cotangents, ref64):
    """Errors of PyTorch running the definition in the dtype of the tensors: name -> Errors."""
    theirs = run(definition, tensors, cotangents)
    return {n: errors(theirs[n], ref64[n]) for n in ref64}
