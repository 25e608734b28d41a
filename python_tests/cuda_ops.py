"""The CUDA kernels on the cases of op_cases: calls, and their errors against fp64, on the GPU.

The contract is that of helpers: errors against the definition in fp64, measured by those of
PyTorch's own attention on the same GPU in the same dtype.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import gpu_checks
import pytest
import torch
from gpu_checks import LSE_TOLERANCE
from helpers import assert_close_to_reference, run, worse
from op_cases import (
    ALL_GIVEN,
    DILATED_CASES,
    FLASH_CASES,
    INFINI_CASES,
    LANDMARK_CASES,
    Case,
    label,
    with_options,
)
from op_checks import call_options, cotangents, infini_named, infini_tensors, named

import lctx_kernels
from lctx_kernels import reference

NAMES = ("flash", "landmark", "dilated", "infini")
ALIGNED_LAYOUTS = ("contiguous", "transposed", "packed by 16 bytes", "every other token")


@dataclass(frozen=True)
class Call:
    """One call of the public function `name`, its tensors on the GPU."""

    name: str
    tensors: dict[str, Any]
    options: dict[str, Any]

    def ours(self, **more):
        """Results by name: out and lse, or out, M and z."""
        with torch.no_grad():
            ours = self._named(getattr(lctx_kernels, f"{self.name}_attention"), **more)
            return ours(**self.tensors)

    def exact(self):
        """The same by the definition in fp64."""
        with torch.no_grad():
            return self._definition()(**{n: x.double() for n, x in self.tensors.items()})

    def gradients(self, **more):
        """Every gradient by name, ours and those of the definition in fp64."""
        upstream = {
            n: x.masked_fill(y.isinf().cpu(), 0)
            for (n, y) in self.exact().items()
            for x in cotangents({n: y.shape}).values()
        }
        ours = self._named(getattr(lctx_kernels, f"{self.name}_attention"), **more)
        definition = self._definition()
        doubles = {n: x.double() for n, x in self.tensors.items()}
        results = run(ours, self.tensors, upstream), run(definition, doubles, upstream)
        return [{n: x for n, x in r.items() if n[0] == "d"} for r in results]

    def _definition(self):
        options = {n: x for n, x in self.options.items() if n != "deterministic"}
        return replace(self, options=options)._named(getattr(reference, f"{self.name}_attention"))

    def _named(self, function, **more):
        options = self.options | more
        if self.name == "infini":
            return infini_named(function, **options)
        if function is getattr(lctx_kernels, f"{self.name}_attention"):
            options["return_lse"] = True
        return named(function, "out", "lse", **options)

    def reasons(self, needs_grad=False):
        """Why the library refuses this call; [] if it does not."""
        tensors = {n: x.detach().requires_grad_(needs_grad) for n, x in self.tensors.items()}
        if "M" in tensors:
            tensors["mem"] = tensors.pop("M"), tensors.pop("z")
        return lctx_kernels.supports(f"{self.name}_attention", **tensors, **self.options)

    def skip_if_not_built(self, needs_grad=False):
        """Skip without a kernel; at head dimensions that every kernel has, a refusal fails."""
        reasons = self.reasons(needs_grad)
        if any("has no cuda kernel" in reason for reason in reasons):
            pytest.skip(reasons[0])
        if reasons and self.tensors["q"].shape[-1] not in (64, 128):
            pytest.skip("; ".join(reasons))
        assert reasons == []


def prepare(name, case, dtype=torch.bfloat16, seed=0):
    """The call that a case stands for; skips the test where no kernel serves it."""
    options = call_options(case, "cuda")
    if name == "infini":
        given = options.pop("given", ("gate",))
        tensors = infini_tensors(case, dtype, given, "cuda", seed)
    else:
        tensors = case.qkv(dtype, "cuda", seed)
    call = Call(name, tensors, options)
    call.skip_if_not_built()
    return call


@functools.cache
def self_attention_errors(T, Hq, Hkv, D, magnitude, dtype, scale):
    """SDPA's errors at this size, causal and not: the larger of both."""
    case = Case(B=max(2, 1024 // T), T=T, Hq=Hq, Hkv=Hkv, Dk=D, magnitude=magnitude)
    qkv = case.qkv(dtype, "cuda").values()
    both = [
        {"out": gpu_checks.baseline(*qkv, causal=causal, scale=scale)} for causal in (True, False)
    ]
    return worse(*both)["out"]


def baseline(case, call):
    """SDPA's errors for dense attention of this size, or on these tensors if those are worse."""
    q, k, v = (call.tensors[n] for n in "qkv")
    scale = case.options.get("scale")
    T, D, dtype = max(case.T, case.num_keys, 64), q.shape[-1], q.dtype
    found = self_attention_errors(T, q.shape[2], k.shape[2], D, case.magnitude, dtype, scale)
    if q.numel() and k.numel():
        these = gpu_checks.baseline(q, k, v, scale=scale)
        found = worse({"out": found}, {"out": these})["out"]
    return found


def at_least_rounded_operands(measure, dtype):
    """Errors, or those of a sum of products of operands of `dtype` where they are smaller."""
    eps = torch.finfo(dtype).eps
    return measure._replace(rms=max(measure.rms, eps / 4), max=max(measure.max, eps))


def check_results(ours, exact, measure):
    """Every result within the contract.

    States have the relative error that out may have, or that of sums of products of rounded
    operands: sharp queries make that of out smaller.
    """
    for name, result in ours.items():
        if name == "lse":
            torch.testing.assert_close(result.double(), exact[name], **LSE_TOLERANCE)
        else:
            allowed = measure
            if name != "out":
                allowed = at_least_rounded_operands(measure, ours["out"].dtype)
            assert_close_to_reference(name, result, exact[name], allowed)


@functools.cache
def self_attention_gradient_errors(T, Hq, Hkv, D, magnitude, dtype, scale):
    case = Case(B=max(2, 1024 // T), T=T, Hq=Hq, Hkv=Hkv, Dk=D, magnitude=magnitude)
    q, k, v = case.qkv(dtype, "cuda").values()
    dout = cotangents({"out": q.shape})["out"].cuda()
    both = [
        gpu_checks.gradient_baseline(q, k, v, dout, causal=causal, scale=scale)
        for causal in (True, False)
    ]
    return worse(*both)


def gradient_baseline(case, call):
    """SDPA's errors of the gradients: "q", "k", "v" -> Errors; see baseline()."""
    q, k, v = (call.tensors[n] for n in "qkv")
    scale, D = case.options.get("scale"), q.shape[-1]
    T = max(case.T, case.num_keys, 64)
    found = self_attention_gradient_errors(
        T, q.shape[2], k.shape[2], D, case.magnitude, q.dtype, scale
    )
    if q.numel() and k.numel():
        dout = cotangents({"out": q.shape})["out"].cuda()
        found = worse(found, gpu_checks.gradient_baseline(q, k, v, dout, scale=scale))
    return found


def check_gradients(name, case, dtype=torch.bfloat16, **options):
    """Run a case forward and backward and compare every gradient with fp64.

    What the memory gives dv is a sum of products of rounded operands, as its states are: see
    check_results.
    """
    call = prepare(name, case, dtype)
    call = replace(call, options=call.options | options)
    call.skip_if_not_built(needs_grad=True)
    ours, exact = call.gradients()
    measure = gradient_baseline(case, call)
    # What is kept in fp32 (dgate, dM, dz) may have the relative error of dq.
    measure |= {n: measure["q"]._replace(norm=0.0) for n in "gMz"}
    if name == "infini":
        measure["v"] = at_least_rounded_operands(measure["v"], dtype)
    for n, result in ours.items():
        given = call.tensors[n[1:]]
        assert result.dtype == given.dtype and result.shape == given.shape
        assert_close_to_reference(n, result, exact[n], measure[n[1]])


def check(name, case, dtype=torch.bfloat16):
    """Run a case and compare with fp64; returns the results by name."""
    call = prepare(name, case, dtype)
    ours = call.ours()
    assert ours["out"].dtype == dtype
    assert all(ours[n].dtype == torch.float32 for n in ours if n != "out")
    assert all(x.is_contiguous() for x in ours.values())
    check_results(ours, call.exact(), baseline(case, call))
    return ours


def runs_on_gpu(case):
    """Whether the Hopper kernels promise to take a case."""
    scale = case.options.get("scale")
    return (
        case.Dk % 8 == 0
        and case.Dv in (None, case.Dk)
        and (scale is None or scale > 0)
        and case.layout in ALIGNED_LAYOUTS
    )


TILE_EDGES = [
    Case(T=T, B=1, Hq=2, Hkv=1, Dk=D)
    for D in (64, 128, 256)
    for T in (64, 65, 127, 129, 191, 193, 384, 700)
]
LONGNET = ([512, 1024, 2048, 4096], [1, 2, 4, 8])
LONG = [Case(T=T, B=1, Hq=2, Hkv=1, Dk=D) for D in (64, 128) for T in (2048, 3001)]
CASES = {
    "flash": [*FLASH_CASES, *TILE_EDGES, *with_options(TILE_EDGES, causal=False)],
    "landmark": [
        *LANDMARK_CASES,
        *(c for L in (2, 51, 64, 256) for c in with_options(TILE_EDGES, block_size=L)),
        *(c for p in (0.01, 0.3) for c in with_options(TILE_EDGES, density=p)),
        *(Case(T=65, Tk=n, Hkv=2, Dk=64, options={"block_size": 64}) for n in (400, 449)),
        *with_options(LONG, block_size=64),
    ],
    "dilated": [
        *DILATED_CASES,
        *(
            c
            for causal in (True, False)
            for c in with_options(TILE_EDGES, branches=([64, 256, 512], [1, 2, 4]), causal=causal)
        ),
        *with_options(LONG, branches=LONGNET),
        Case(T=3001, B=1, Hq=12, Dk=64, options={"branches": LONGNET, "head_offset": "block"}),
    ],
    "infini": [
        *INFINI_CASES,
        *(
            c
            for n in (64, 100, 256)
            for update in ("linear", "delta")
            for c in with_options(TILE_EDGES, segment_len=n, update=update, given=ALL_GIVEN)
        ),
        *(c for u in ("linear", "delta") for c in with_options(LONG, segment_len=1024, update=u)),
    ],
}
# One case for each way a kernel can be called; lengths that are no multiple of any tile.
STANDARD = {
    "flash": Case(T=1111, Hq=6, Hkv=2, Dk=128),
    "landmark": Case(T=1111, Hq=6, Hkv=2, Dk=128, options={"block_size": 64}),
    "dilated": Case(T=1111, Hq=6, Hkv=2, Dk=64, options={"branches": ([256, 600, 2000],
                                                                       [1, 2, 4])}),
    "infini": Case(T=1111, Hq=6, Hkv=2, Dk=128, options={"segment_len": 256, "update": "delta",
                                                          "given": ALL_GIVEN}),
}  # fmt: skip


def standard(name, **changes):
    """STANDARD[name] with other fields, or with other options."""
    case = STANDARD[name]
    return replace(case, options=case.options | changes.pop("options", {}), **changes)


CASES = {
    name: [*filter(runs_on_gpu, cases), *(standard(name, B=3, Dk=D) for D in (64, 128, 256))]
    for name, cases in CASES.items()
}
EVERY_CASE = [
    pytest.param(name, case, id=f"{name} {label(case)}")
    for name, cases in CASES.items()
    for case in cases
]
