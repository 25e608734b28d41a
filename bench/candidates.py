"""Turns a candidate's name into a call: ours, PyTorch's by back end, flex, FlashAttention-4."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import lctx_kernels
from lctx_kernels import reference

from .registry import COMPETITORS, DTYPES, OPS, Pass, Shape

Tensors = tuple[torch.Tensor, ...]
SDPA_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Inputs:
    """The tensors that get gradients, and the gradient of `out`."""

    tensors: Tensors  # q, k, v; or out_a, lse_a, out_b, lse_b
    dout: torch.Tensor


@dataclass(frozen=True)
class Call:
    """`run()` gives (out,) or (out, gradients...), `public` turns one into (B, T, H, D)."""

    run: Callable[[], Tensors]
    public: Callable[[torch.Tensor], torch.Tensor] = lambda x: x


def make_inputs(shape: Shape, device: str, kind: str = "attention", seed: int = 0) -> Inputs:
    """Standard normal inputs, the same for every candidate of a group."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, DTYPES[shape.dtype])
    stat = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        draw = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(*size, generator=generator, dtype=draw).to(device, dtype)

    B, T, Hq, Hkv, D = shape.B, shape.T, shape.Hq, shape.Hkv, shape.D
    if kind == "merge":
        parts = [x for _ in range(2) for x in (normal(B, T, Hq, D), normal(B, Hq, T, dtype=stat))]
        return Inputs(tuple(parts), normal(B, T, Hq, D))
    return Inputs(
        (normal(B, T, Hq, D), normal(B, T, Hkv, D), normal(B, T, Hkv, D)), normal(B, T, Hq, D)
    )


def is_ours(candidate: str) -> bool:
    return candidate in OPS


def op_of(candidate: str) -> str:
    """The operation whose definition and FLOPs a candidate has; "flash" for dense rivals."""
    return "merge" if candidate == "torch-merge" else candidate if is_ours(candidate) else "flash"


def build(
    candidate: str, inputs: Inputs, pass_: Pass, options: Mapping[str, Any], backend: str = "auto"
) -> Call:
    """The call of a candidate on `inputs`; raises what the candidate raises in its set-up."""
    if is_ours(candidate) or candidate == "torch-merge":
        return Call(
            _with_pass(
                _our_forward(candidate, options, backend), inputs.tensors, inputs.dout, pass_
            )
        )
    if candidate == "fa4":
        return Call(_with_pass(_fa4_forward(), inputs.tensors, inputs.dout, pass_))
    # PyTorch's attention gets its fastest layout, (B, H, T, D) contiguous, made before the timing.
    tensors = tuple(x.transpose(1, 2).contiguous() for x in inputs.tensors)
    dout = inputs.dout.transpose(1, 2).contiguous()
    if candidate == "flex":
        forward, context = _flex_forward(tensors), nullcontext
    elif candidate == "sdpa" or candidate in SDPA_BACKENDS:
        forward, context = _sdpa_forward, _sdpa_context(candidate)
    else:
        raise ValueError(
            f"candidate {candidate!r}: expected one of {', '.join((*OPS, *COMPETITORS))}"
        )
    return Call(_with_pass(forward, tensors, dout, pass_, context), lambda x: x.transpose(1, 2))


def _with_pass(
    forward: Callable[..., torch.Tensor],
    tensors: Tensors,
    dout: torch.Tensor,
    pass_: Pass,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], Tensors]:
    def run_forward() -> Tensors:
        with torch.no_grad(), context():
            return (forward(*tensors),)

    leaves = tuple(x.detach().requires_grad_() for x in tensors)

    def run_both() -> Tensors:
        with context():
            out = forward(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    return run_forward if pass_ == "fwd" else run_both


def _our_forward(
    candidate: str, options: Mapping[str, Any], backend: str
) -> Callable[..., torch.Tensor]:
    if candidate == "torch-merge":
        return lambda *parts: reference.merge_attention(*parts)[0]
    if candidate == "merge":
        return lambda *parts: lctx_kernels.merge_attention(*parts)[0]
    function = getattr(lctx_kernels, f"{candidate}_attention")

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = function(q, k, v, backend=backend, **options)
        return result[0] if isinstance(result, tuple) else result

    return forward


def _sdpa_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def _sdpa_context(candidate: str) -> Callable[[], AbstractContextManager[Any]]:
    if candidate == "sdpa":
        return nullcontext
    return lambda: sdpa_kernel(SDPA_BACKENDS[candidate])


def _flex_forward(tensors: Tensors) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, _ = tensors
    length = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = q.shape[1] != k.shape[1]
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)


def _fa4_forward() -> Callable[..., torch.Tensor]:
    from flash_attn.cute import flash_attn_func

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = flash_attn_func(q, k, v, causal=True)
        return result[0] if isinstance(result, tuple) else result

    return forward
