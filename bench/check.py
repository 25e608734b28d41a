"""No number without a check: what is ours is compared with its fp64 definition before it is timed.

At the timed shape: sampled rows of out, and of dq where a row of the definition gives it. At a
short length: out and every gradient, whole. The measure is RMS(ours - fp64) / RMS(fp64); the limit
is 1.5 times the same measure of PyTorch's own attention doing the dense computation in that dtype,
with a floor at rounding level.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lctx_kernels import reference
from lctx_kernels._measure import relative_rms
from lctx_kernels._rowcheck import definition_gradients, definition_rows, sample_rows

from .candidates import Call, Inputs, build, make_inputs
from .registry import BASELINES, DTYPES, OPS, Pass, Shape, is_ours, op_of

SMALL_LENGTH = 500
LARGE = 1 << 24  # elements of q or k beyond which one batch row and three heads are checked
FACTOR = 1.5
FLOOR_UNITS = {
    "fp64": 16,
    "fp32": 16,
    "bf16": 2,
    "fp16": 2,
}  # in units of the dtype's rounding error


@dataclass
class Check:
    """Relative RMS errors by quantity, and the quantities that are over their limit."""

    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """One line per quantity over its limit; NaN is over every limit."""
        return [
            f"{name} error {error:.1e} is over {self.limits[name]:.1e}"
            for name, error in self.errors.items()
            if not error <= self.limits.get(name, float("inf"))
        ]


class Checker:
    """Checks candidates; the short-length part is done once per candidate, head dims and dtype."""

    def __init__(self, device: str, backend: str = "auto") -> None:
        self.device, self.backend = device, backend
        self._small: dict[tuple[str, Shape, Pass, str], dict[str, float]] = {}
        self._dense: dict[
            tuple[Shape, Pass], dict[str, float]
        ] = {}  # PyTorch's own errors at the timed shapes

    def check(
        self,
        candidate: str,
        shape: Shape,
        pass_: Pass,
        inputs: Inputs,
        call: Call,
        options: Mapping[str, Any],
    ) -> Check:
        """Errors of `call` at its shape ("out", "dq") and at a short length ("small out", ...)."""
        if op_of(candidate) in BASELINES:
            return Check()
        small = replace(shape, T=min(SMALL_LENGTH, shape.T), B=min(2, shape.B))
        errors = _row_errors(candidate, inputs, call, _meaning(options))
        errors |= {
            f"small {name}": e
            for name, e in self._small_errors(candidate, small, pass_, options).items()
        }
        result = Check(errors)
        if is_ours(candidate):
            dense = {
                f"small {name}": e
                for name, e in self._small_errors("sdpa", small, pass_, {}).items()
            }
            dense |= self._dense.get((shape, pass_), {})
            floor = (
                FLOOR_UNITS[shape.dtype] * torch.finfo(getattr(torch, DTYPES[shape.dtype])).eps / 2
            )
            result.limits = {
                name: max(FACTOR * dense.get(name, dense.get(f"small {name}", 0.0)), floor)
                for name in errors
            }
        elif op_of(candidate) == "flash":
            self._dense.setdefault((shape, pass_), errors)
        return result

    def _small_errors(
        self, candidate: str, shape: Shape, pass_: Pass, options: Mapping[str, Any]
    ) -> dict[str, float]:
        op = op_of(candidate)
        options = mask(shape.causal) | {**options, **_short_options(op, options)}
        key = (candidate, shape, pass_, repr(options))
        if key not in self._small:
            kind = "merge" if op == "merge" else "attention"
            inputs = make_inputs(shape, self.device, kind, seed=1, pass_=pass_)
            call = build(candidate, inputs, pass_, options, self.backend)
            self._small[key] = _compare(call, _dense_definition(op, inputs, _meaning(options)))
        return self._small[key]


def _meaning(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the definition has: not how a result is computed."""
    return {n: x for n, x in options.items() if n != "deterministic"}


def mask(causal: bool) -> dict[str, Any]:
    """The option that asks for a mask which is not the op's default."""
    return {} if causal else {"causal": False}


def _short_options(op: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Segments that fit a short length, and what else `options` leaves out."""
    lengths = ("segment_len", "segment_lengths", "dilation_rates")
    return {n: x for n, x in OPS[op].small.items() if n in lengths or n not in options}


def _compare(call: Call, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    values = zip(expected.items(), call.run(), strict=False)  # a forward gives `out` alone
    return {name: relative_rms(call.public(value), want) for (name, want), value in values}


def _dense_definition(
    op: str, inputs: Inputs, options: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    if op == "merge":
        leaves = [x.detach().double().requires_grad_() for x in inputs.tensors]
        out, _ = reference.merge_attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, inputs.dout.double())
        names = ("dout_a", "dlse_a", "dout_b", "dlse_b")
        return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}
    if inputs.dout is None:
        with torch.no_grad():
            doubles = [x.double() for x in inputs.tensors]
            return {"out": getattr(reference, f"{op}_attention")(*doubles, **options)[0]}
    values = definition_gradients(op, *inputs.tensors, inputs.dout, **options)
    return dict(zip(("out", "dq", "dk", "dv"), values, strict=True))


def _row_errors(
    candidate: str, inputs: Inputs, call: Call, options: Mapping[str, Any]
) -> dict[str, float]:
    op = op_of(candidate)
    if op == "merge":
        return {}
    q, k, v = inputs.tensors
    rows, Hq = sample_rows(q.shape[1]), q.shape[2]
    batch, heads = slice(None), None
    if max(q.numel(), k.numel()) > LARGE:
        batch, heads = slice(-1, None), sorted({0, Hq // 2, Hq - 1})
    result = call.run()
    # Infini's rows come out of its whole definition, whose graph does not fit at long lengths.
    with_gradient = len(result) > 1 and op != "infini"

    def sampled(x: torch.Tensor) -> torch.Tensor:
        return x[batch, rows] if heads is None else x[batch, rows][:, :, heads]

    leaf = q.detach().requires_grad_(with_gradient)
    options = mask(inputs.causal) | dict(options)
    want = definition_rows(op, leaf[batch], k[batch], v[batch], rows, heads, **options)
    errors = {"out": relative_rms(sampled(call.public(result[0])), want)}
    if with_gradient:
        assert inputs.dout is not None
        (dq,) = torch.autograd.grad(want, leaf, sampled(inputs.dout).double())
        errors["dq"] = relative_rms(sampled(call.public(result[1])), sampled(dq))
    return errors
