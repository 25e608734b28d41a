"""Fake kernels, autograd and refusals of every `lctx::` op, registered from one table.

Names carry the meaning (csrc/api/register.cpp). An argument `dX` of a backward is the gradient of
the forward's output X, a result `dX` the gradient of its input X, an argument `needs_X` whether
that gradient is wanted; every other argument is the forward's input or output of that name. An
output without a `dX` argument is not differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _load
from ._dtypes import stat_dtype

Fake = Callable[[SimpleNamespace], tuple[Tensor, ...]]


def _like(tensor: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (tensor, *more))


def _softmax_fwd(a: SimpleNamespace) -> tuple[Tensor, ...]:
    B, T, H, _ = a.q.shape
    out = a.q.new_empty(B, T, H, a.v.shape[-1])
    return out, a.q.new_empty(B, H, T, dtype=stat_dtype(a.q.dtype))


def _softmax_bwd(a: SimpleNamespace) -> tuple[Tensor, ...]:
    return tuple(
        x.new_empty(x.shape if getattr(a, f"needs_{name}", True) else (0,))
        for name, x in (("q", a.q), ("k", a.k), ("v", a.v))
    )


def _infini_fwd(a: SimpleNamespace) -> tuple[Tensor, ...]:
    (B, T, H, Dk), (Hkv, Dv) = a.q.shape, a.v.shape[-2:]
    S = (T + a.segment_len - 1) // a.segment_len
    stat = stat_dtype(a.q.dtype)
    keeps = a.save_local and a.update == "delta" and a.q.device.type == "cuda"
    return (
        a.q.new_empty(B, T, H, Dv),
        a.q.new_empty((B, T, H, Dv) if a.save_local else 0),
        a.q.new_empty(B, H, T, dtype=stat),
        a.q.new_empty(B, Hkv, S, Dk, Dv, dtype=stat),
        a.q.new_empty(B, Hkv, S, Dk, dtype=stat),
        a.q.new_empty(B, Hkv, Dk, Dv, dtype=stat),
        a.q.new_empty(B, Hkv, Dk, dtype=stat),
        a.q.new_empty((2, B, Hkv, S, Dk, Dk) if keeps else 0, dtype=torch.bfloat16),
    )


def _infini_bwd(a: SimpleNamespace) -> tuple[Tensor, ...]:
    optional = (
        a.q.new_empty(0, dtype=stat_dtype(a.q.dtype)) if x is None else x.new_empty(x.shape)
        for x in (a.M, a.z, a.gate)
    )
    q_mem = a.q.new_empty(0) if a.q_mem is None else a.q_mem.new_empty(a.q_mem.shape)
    k_mem = a.k.new_empty(0) if a.k_mem is None else a.k_mem.new_empty(a.k_mem.shape)
    return (*_like(a.q, a.k, a.v), q_mem, k_mem, *optional)


def _merge_fwd(a: SimpleNamespace) -> tuple[Tensor, ...]:
    return _like(a.out_a, a.lse_a)


def _merge_bwd(a: SimpleNamespace) -> tuple[Tensor, ...]:
    return _like(a.out_a, a.lse_a, a.out_b, a.lse_b)


FAMILIES: dict[str, tuple[Fake, Fake]] = {
    "flash": (_softmax_fwd, _softmax_bwd),
    "infini": (_infini_fwd, _infini_bwd),
    "landmark": (_softmax_fwd, _softmax_bwd),
    "dilated": (_softmax_fwd, _softmax_bwd),
    "merge": (_merge_fwd, _merge_bwd),
}
LIBRARY = torch.library.Library("lctx", "FRAGMENT")
"""Keeps what is registered here by itself."""

ARGUMENTS: dict[str, tuple[str, ...]] = {}
"""Argument names of every registered op, e.g. ARGUMENTS["flash_fwd"]."""

FUNCTIONS: dict[str, Any] = {}
"""The torch.autograd.Function of every op that has a gradient; its first argument is a keyset or,
outside of the dispatcher, None."""

KERNELS: dict[str, tuple[str, ...]] = {}
"""Device types that every registered op has a kernel for, e.g. KERNELS["flash_fwd"] == ("cpu",)."""


STRIDED = ("q", "k", "v", "q_mem", "k_mem", "out_a", "out_b", "dout")
"""Arguments that the kernels take with free outer strides; all others they take contiguous."""


def _usable(name: str, value: Tensor) -> Tensor:
    if name not in STRIDED or value.stride(-1) != 1:
        return value.contiguous()
    # Autograd may hand over a gradient with strides that the copy engine cannot walk.
    return value.contiguous() if name == "dout" and not _walkable(value) else value


def _walkable(x: Tensor) -> bool:
    """Whether a GPU tensor has outer strides at multiples of 16 bytes."""
    return not x.is_cuda or all(
        size <= 1 or (stride > 0 and stride * x.element_size() % 16 == 0)
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )


def needs_grad(*inputs: Any) -> bool:
    """Whether a call on these is followed by a backward."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in inputs
    )


def call(op: str, values: dict[str, Any]) -> Any:
    """Call `lctx::op` with the arguments of its schema taken from `values` by name.

    Raises:
        NotImplementedError: Inside a transform that the op has no rule for; without this check
            forward-mode differentiation would silently give tangents of 0.
    """
    arguments = [values[name] for name in ARGUMENTS[op]]
    for index, (name, value) in enumerate(zip(ARGUMENTS[op], arguments, strict=True)):
        if isinstance(value, Tensor):
            arguments[index] = _usable(name, value)
    if forward_ad._current_level >= 0:
        _refuse(op, "forward-mode differentiation is")
    if (
        not torch.compiler.is_compiling()  # there, torch itself refuses
        and torch._C._functorch.peek_interpreter_stack() is not None
    ):
        _refuse(op, "torch.func transforms (vmap, grad, vjp, jacrev) are")
    function = getattr(torch.ops.lctx, op)
    if torch.compiler.is_compiling():
        return function(*arguments)
    # What the op's kernel of autograd would do, without the way through the dispatcher to it.
    if needs_grad(*arguments):
        return FUNCTIONS[op].apply(None, *arguments) if op in FUNCTIONS else function(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return function(*arguments)


def _refuse(op: str, what: str) -> NoReturn:
    raise NotImplementedError(
        f"lctx::{op}: {what} not supported; expected plain tensors and one backward, by "
        "torch.autograd.grad or .backward(); nearest is the definition in plain PyTorch, by "
        'backend="reference" or lctx_kernels.reference'
    )


def _overload(op: str) -> Any:
    return getattr(torch.ops.lctx, op).default


def _register_fake(op: str, fake: Fake) -> None:
    names = ARGUMENTS[op]
    # Arguments that have their default value are not passed.
    torch.library.register_fake(
        f"lctx::{op}", lambda *args: fake(SimpleNamespace(**dict(zip(names, args, strict=False))))
    )


def _register_refusals(op: str) -> None:
    """What `call` cannot see: vmap of an op called directly, and the gradient of a backward."""

    def vmap(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(op, "torch.func.vmap is")

    def double_backward(ctx: Any, *grads: Any) -> NoReturn:
        _refuse(op, "double backward is")

    torch.library.register_vmap(f"lctx::{op}", vmap)
    if op.endswith("_bwd"):
        torch.library.register_autograd(f"lctx::{op}", double_backward)


def _register_autograd(family: str) -> None:
    fwd, bwd = _overload(f"{family}_fwd"), _overload(f"{family}_bwd")
    fwd_inputs, arguments = ARGUMENTS[f"{family}_fwd"], ARGUMENTS[f"{family}_bwd"]
    outputs = tuple(r.name for r in fwd._schema.returns)
    results = tuple(r.name for r in bwd._schema.returns)
    grads = tuple(name for name in arguments if name[0] == "d" and name[1:] in outputs)
    needs = {f"needs_{name}": index for index, name in enumerate(fwd_inputs)}
    kept = tuple(name for name in arguments if name not in (*grads, *needs))
    result_of = tuple(
        results.index(f"d{name}") if f"d{name}" in results else None for name in fwd_inputs
    )

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        values = dict(zip(fwd_inputs, inputs, strict=True))
        values |= zip(outputs, output, strict=True)
        values["deterministic"] = (
            values.get("deterministic", False) or torch.are_deterministic_algorithms_enabled()
        )
        ctx.tensors = tuple(name for name in kept if isinstance(values[name], Tensor))
        ctx.options = {name: values[name] for name in kept if name not in ctx.tensors}
        ctx.out_shape = output[0].shape
        ctx.save_for_backward(*(values[name] for name in ctx.tensors))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(values[n] for n in outputs if f"d{n}" not in grads))

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        values = dict(zip(ctx.tensors, saved, strict=True)) | ctx.options
        values |= {f"d{name}": grad for name, grad in zip(outputs, grad_outputs, strict=True)}
        values |= {name: wanted[index] for name, index in needs.items()}
        if grad_outputs[0] is None:  # the only gradient that no schema makes optional
            values[f"d{outputs[0]}"] = saved[0].new_zeros(ctx.out_shape)
        found = call(f"{family}_bwd", values)
        return None, *(
            found[index] if needed else None
            for index, needed in zip(result_of, wanted, strict=True)
        )

    _differentiate(fwd, setup_context, backward)


def _differentiate(
    op: Any, setup_context: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> None:
    """What torch.library.register_autograd does, with an op's schema read once and not in calls.

    `backward` has the gradients of the op's inputs behind a None.
    """
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def below(keyset: Any, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                return op(*inputs)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
        output = below(keyset, inputs)
        setup_context(ctx, inputs + defaults[len(inputs) :], output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"{op._opname}_function", (torch.autograd.Function,), members)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        return function.apply(keyset, *inputs) if differentiable else below(keyset, inputs)

    LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)
    FUNCTIONS[op._opname] = function


def register(family: str, fakes: tuple[Fake, Fake]) -> None:
    """Give `lctx::<family>_fwd` and `_bwd`, defined and implemented elsewhere, all that is here."""
    for op, fake in zip((f"{family}_fwd", f"{family}_bwd"), fakes, strict=True):
        ARGUMENTS[op] = tuple(argument.name for argument in _overload(op)._schema.arguments)
        KERNELS[op] = tuple(
            key.lower()
            for key in ("CPU", "CUDA")
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"lctx::{op}", key)
        )
        _register_fake(op, fake)
        _register_refusals(op)
    _register_autograd(family)


if _load.LIBRARY_ERROR is None:
    for _family, _fakes in FAMILIES.items():
        register(_family, _fakes)
