"""Which backend serves a call, why one cannot, and the log of what ran."""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

from . import _load, _ops

FAMILY = {
    "flash_attention": "flash",
    "infini_attention": "infini",
    "landmark_attention": "landmark",
    "dilated_attention": "dilated",
    "merge_attention": "merge",
    "ring_attention": "ring",
    "cp.decode_attention": "ring",
}
"""Ops that exist: public function -> family of `lctx::` ops."""

FORWARD_ONLY = {"cp.decode_attention": "ring_attention"}
"""Ops without gradients, and what is nearest that has them."""

REFERENCES = {
    "merge_attention": "lctx_kernels.reference.merge_attention",
    "ring_attention": "lctx_kernels.reference.ring_attention",
    "cp.decode_attention": "lctx_kernels.reference.flash_attention over the keys of all ranks",
}
"""Definitions of the ops that have no option `backend`."""

CUDA_CAPABILITY = (9, 0)  # sm_90a code runs on no other

logger = logging.getLogger("lctx_kernels")
LOG = os.environ.get("LCTX_LOG", "0") not in ("", "0")
if LOG:
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


def resolve(backend: str, device_type: str) -> str:
    """Backend that a call runs on: `auto` is the one of the tensors' device."""
    if backend != "auto":
        return backend
    return "cpu" if device_type == "meta" else device_type


def reference_of(op: str) -> str:
    """How the definition of an op in plain PyTorch is called."""
    return REFERENCES.get(op, 'backend="reference"') + " (plain PyTorch)"


@cache
def _cuda_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def unavailable(op: str, where: str, device: torch.device, needs_grad: bool) -> str | None:
    """Why backend `where` cannot run `op`, or None. The reference backend always can."""
    if where == "reference":
        return None
    if needs_grad and op in FORWARD_ONLY:
        return (
            f"{op} has no backward; expected torch.no_grad() or tensors without requires_grad; "
            f"nearest is {FORWARD_ONLY[op]}"
        )
    nearest = reference_of(op)
    if where not in ("cpu", "cuda"):
        return f"no kernels for device type {where}; expected cpu or cuda; nearest is {nearest}"
    error = _load.LIBRARY_ERROR
    if error is not None:
        return f"{error}; nearest is {nearest}"
    for suffix in ("fwd", "bwd") if needs_grad else ("fwd",):
        name = f"{FAMILY[op]}_{suffix}"
        if where not in _ops.KERNELS.get(name, ()):
            built = " and ".join(_ops.KERNELS.get(name, ())) or "no device"
            return (
                f"{op} has no {where} kernel: lctx::{name} is built for {built}; "
                f"nearest is {nearest}"
            )
    if where == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_available():
        capability = _cuda_capability(device)
        if capability != CUDA_CAPABILITY:
            return (
                f"{device} has compute capability {capability[0]}.{capability[1]}; "
                f"expected 9.0 (H100, H200); nearest is {nearest}"
            )
    return None
