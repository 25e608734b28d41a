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

from .registry import (
    COMPETITORS,
    COPY_BYTES,
    DTYPES,
    LOCAL_SEGMENT,
    OPS,
    VARIANTS,
    Pass,
    Shape,
    is_ours,
)

Tensors = tuple[torch.Tensor, ...]
SDPA_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Inputs:
    """The tensors that get gradients, and the gradient of `out` where one is asked for."""

    tensors: Tensors  # q, k, v; or out_a, lse_a, out_b, lse_b
    dout: torch.Tensor | None
    causal: bool = True


@dataclass(frozen=True)
class Call:
    """`run()` gives (out,) or (out, gradients...), `public` turns one into (B, T, H, D)."""

    run: Callable[[], Tensors]
    public: Callable[[torch.Tensor], torch.Tensor] = lambda x: x


def make_inputs(
    shape: Shape, device: str, kind: str = "attention", seed: int = 0, pass_: Pass = "fwd_bwd"
) -> Inputs:
    """Standard normal inputs, the same for every candidate of a group, drawn on their device."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, DTYPES[shape.dtype])
    stat = torch.promote_types(dtype, torch.float32)

    def normal(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype, device=device)

    B, T, Hq, Hkv, D = shape.B, shape.T, shape.Hq, shape.Hkv, shape.D
    if kind == "merge":
        parts = [x for _ in range(2) for x in (normal(B, T, Hq, D), normal(B, Hq, T, dtype=stat))]
        return Inputs(tuple(parts), normal(B, T, Hq, D))
    qkv = (normal(B, shape.queries, Hq, D), normal(B, T, Hkv, D), normal(B, T, Hkv, D))
    dout = None if pass_ == "fwd" else normal(B, shape.queries, Hq, D)
    return Inputs(qkv, dout, shape.causal)


def build(
    candidate: str, inputs: Inputs, pass_: Pass, options: Mapping[str, Any], backend: str = "auto"
) -> Call:
    """The call of a candidate on `inputs`; raises what the candidate raises in its set-up."""
    if is_ours(candidate) or candidate == "torch-merge":
        forward = _our_forward(candidate, inputs, options, backend)
        return Call(_with_pass(forward, inputs.tensors, inputs.dout, pass_))
    if candidate == "fa4":
        return Call(_with_pass(_fa4_forward(inputs.causal), inputs.tensors, inputs.dout, pass_))
    if candidate == "copy":
        return Call(_copy(inputs.tensors[0].device))
    if candidate.startswith("local-"):
        candidate, inputs = _inside_segments(candidate.removeprefix("local-"), inputs)
    # PyTorch's attention gets its fastest layout, (B, H, T, D) contiguous, made before the timing.
    tensors = tuple(x.transpose(1, 2).contiguous() for x in inputs.tensors)
    dout = None if inputs.dout is None else inputs.dout.transpose(1, 2).contiguous()
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if candidate == "flex":
        forward = _flex_forward(tensors)
    elif candidate == "sdpa" or candidate in SDPA_BACKENDS:
        forward, context = _sdpa_forward(inputs), _sdpa_context(candidate)
    else:
        raise ValueError(
            f"candidate {candidate!r}: expected one of {', '.join((*OPS, *VARIANTS, *COMPETITORS))}"
        )
    return Call(_with_pass(forward, tensors, dout, pass_, context), lambda x: x.transpose(1, 2))


def _inside_segments(candidate: str, inputs: Inputs) -> tuple[str, Inputs]:
    """Segments of a sequence as a batch, for the local part alone."""
    plain = candidate.removesuffix("-expanded")
    q, *kv = inputs.tensors
    if plain != candidate:
        kv = [x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in kv]
    T = q.shape[1]
    segment = min(LOCAL_SEGMENT, T)
    if T % segment:
        raise NotImplementedError(f"length {T} is no multiple of {segment}")
    cut = [None if x is None else x.reshape(-1, segment, *x.shape[2:]) for x in (*kv, inputs.dout)]
    return plain, Inputs((q.reshape(-1, segment, *q.shape[2:]), *cut[:2]), cut[2])


def _copy(device: torch.device) -> Callable[[], Tensors]:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)


def _with_pass(
    forward: Callable[..., torch.Tensor],
    tensors: Tensors,
    dout: torch.Tensor | None,
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

    if pass_ == "fwd":
        return run_forward
    if pass_ == "fwd_bwd":
        return run_both
    with context():
        out = forward(*leaves)  # once, before the timing

    def run_backward() -> Tensors:
        return (out.detach(), *torch.autograd.grad(out, leaves, dout, retain_graph=True))

    return run_backward


def _our_forward(
    candidate: str, inputs: Inputs, options: Mapping[str, Any], backend: str
) -> Callable[..., torch.Tensor]:
    if candidate == "torch-merge":
        return lambda *parts: reference.merge_attention(*parts)[0]
    if candidate == "merge":
        return lambda *parts: lctx_kernels.merge_attention(*parts)[0]
    if candidate == "flash_carry":
        return _carry_forward(inputs)
    function = getattr(lctx_kernels, f"{candidate}_attention")

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = function(q, k, v, backend=backend, **options)
        return result[0] if isinstance(result, tuple) else result

    return forward


def _carry_forward(inputs: Inputs) -> Callable[..., torch.Tensor]:
    """A step of a ring in the middle of its tour: (out, lse) is read and written in fp32.

    Taking in the same keys again leaves out as it is, so that repeated calls stay right.
    """
    q, k, _ = inputs.tensors
    B, Tq, H, D = q.shape
    out = q.new_zeros(B, Tq, H, D, dtype=torch.float32)
    lse = q.new_full((B, H, Tq), -torch.inf, dtype=torch.float32)
    query_start = k.shape[1] - Tq

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.ops.lctx.flash_carry(
            q, k, v, out, lse, inputs.causal, D**-0.5, 0, query_start, 0, False
        )
        return out

    return forward


def _sdpa_forward(inputs: Inputs) -> Callable[..., torch.Tensor]:
    q, k, _ = inputs.tensors
    Tq, gqa = q.shape[1], q.shape[2] != k.shape[2]
    if inputs.causal and Tq not in (1, k.shape[1]):  # its mask is aligned to the first key
        raise NotImplementedError(f"SDPA has no causal mask for the last {Tq} queries")
    causal = inputs.causal and Tq == k.shape[1]
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)


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


def _fa4_forward(causal: bool) -> Callable[..., torch.Tensor]:
    """The package flash-attn-4; `causal` is aligned to the last position there, too."""
    from flash_attn.cute import flash_attn_func

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result = flash_attn_func(q, k, v, causal=causal)
        return result[0] if isinstance(result, tuple) else result

    return forward
