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

from .candidates import Call, Inputs, build, is_ours, make_inputs, op_of
from .registry import DTYPES, OPS, Pass, Shape

SMALL_LENGTH = 500
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
        self._small: dict[tuple[str, Shape, Pass], dict[str, float]] = {}
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
        small = replace(shape, T=min(SMALL_LENGTH, shape.T), B=min(2, shape.B))
        errors = _row_errors(candidate, inputs, call, options)
        errors |= {
            f"small {name}": e for name, e in self._small_errors(candidate, small, pass_).items()
        }
        result = Check(errors)
        if is_ours(candidate):
            dense = {
                f"small {name}": e for name, e in self._small_errors("sdpa", small, pass_).items()
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

    def _small_errors(self, candidate: str, shape: Shape, pass_: Pass) -> dict[str, float]:
        key = (candidate, shape, pass_)
        if key not in self._small:
            op = op_of(candidate)
            options = dict(OPS[op].small)
            inputs = make_inputs(
                shape, self.device, "merge" if op == "merge" else "attention", seed=1
            )
            call = build(candidate, inputs, pass_, options, self.backend)
            expected = _dense_definition(op, inputs, options)
            self._small[key] = _compare(call, expected)
        return self._small[key]


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
    values = definition_gradients(op, *inputs.tensors, inputs.dout, **options)
    return dict(zip(("out", "dq", "dk", "dv"), values, strict=True))


def _row_errors(
    candidate: str, inputs: Inputs, call: Call, options: Mapping[str, Any]
) -> dict[str, float]:
    op = op_of(candidate)
    if op == "merge":
        return {}
    q, k, v = inputs.tensors
    rows = sample_rows(q.shape[1])
    result = call.run()
    # Infini's rows come out of its whole definition, whose graph does not fit at long lengths.
    with_gradient = len(result) > 1 and op != "infini"
    q = q.detach().requires_grad_(with_gradient)
    want = definition_rows(op, q, k, v, rows, **options)
    errors = {"out": relative_rms(call.public(result[0])[:, rows], want)}
    if with_gradient:
        (dq,) = torch.autograd.grad(want, q, inputs.dout[:, rows].double())
        errors["dq"] = relative_rms(call.public(result[1])[:, rows], dq[:, rows])
    return errors
