"""Example calls of every op and of every public function, shared by the tests beside this file."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lctx_kernels as lk

F32, F64 = torch.float32, torch.float64
ATTENTIONS = ("flash", "infini", "landmark", "dilated")


def rand(*shape, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def qkv(T=19, Tq=None, Hq=4, Hkv=2, D=8, B=2, dtype=F32):
    return (
        rand(B, T if Tq is None else Tq, Hq, D, dtype=dtype, seed=1),
        rand(B, T, Hkv, D, dtype=dtype, seed=2),
        rand(B, T, Hkv, D, dtype=dtype, seed=3),
    )


def _strided_qkv():
    q, k, v = qkv()
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))


def _memory(dtype=F32):
    return rand(2, 2, 8, 8, dtype=dtype), rand(2, 2, 8, dtype=dtype).abs() + 1


def _infini(mem=True, q_mem=True, k_mem=True, gate=True, dtype=F32, T=19):
    q, k, v = qkv(T, dtype=dtype)
    M, z = _memory(dtype) if mem else (None, None)
    return (
        q, k, v, rand(*q.shape, dtype=dtype, seed=5) if q_mem else None,
        rand(*k.shape, dtype=dtype, seed=6) if k_mem else None, M, z,
        rand(4, dtype=dtype) if gate else None,
    )  # fmt: skip


def _documents():
    q, k, v = qkv(B=1)
    return q, k, v, torch.tensor([0, 5, 5, 19], dtype=torch.int32)


def _tokens(dtype=F32):
    labels = torch.tensor([0, 10, -100, 3, 3, 7, -100])
    return rand(7, 8, dtype=dtype), rand(11, 8, dtype=dtype), labels


def _partial(seed, dtype=F32):
    lse = rand(2, 4, 19, dtype=dtype, seed=seed)
    lse[0, 0, :2] = -torch.inf
    return rand(2, 19, 4, 8, dtype=dtype, seed=seed), lse


FORWARD_CALLS = {
    "flash-causal": ("flash", (*qkv(), None, True, 0.3, 0)),
    "flash-strided-window": ("flash", (*_strided_qkv(), None, True, 0.3, 5)),
    "flash-short-queries": ("flash", (*qkv(Tq=7), None, False, 0.3, 0)),
    "flash-fp64": ("flash", (*qkv(dtype=F64), None, True, 0.3, 0)),
    "flash-documents": ("flash", (*_documents(), True, 0.3, 0)),
    "flash-empty": ("flash", (*qkv(T=0), None, True, 0.3, 0)),
    "landmark-regular": ("landmark", (*qkv(), None, 5, 0.3)),
    "landmark-anywhere": ("landmark", (*qkv(Tq=11), torch.arange(38).view(2, 19) % 4 == 2, 0, 0.3)),
    "dilated-exact": ("dilated", (*qkv(), None, [4, 16], [1, 2], True, 0.3, "mod", "exact")),
    "dilated-detached": (
        "dilated",
        (
            *qkv(),
            torch.tensor([19, 6], dtype=torch.int32),
            [8],
            [3],
            False,
            0.3,
            "block",
            "detached",
        ),
    ),
    "infini-empty-memory": (
        "infini",
        (*_infini(mem=False, q_mem=False, k_mem=False, gate=False), 8, "linear", "gate", 0, 0.3),
    ),
    "infini-all-inputs": ("infini", (*_infini(), 8, "delta", "bypass", 2, 0.3)),
    "infini-fp64": ("infini", (*_infini(q_mem=False, dtype=F64), 8, "linear", "bypass", 0, 0.3)),
    "infini-no-tokens": ("infini", (*_infini(T=0), 8, "linear", "gate", 0, 0.3)),
    "merge": ("merge", (*_partial(1), *_partial(2))),
    "merge-fp64": ("merge", (*_partial(1, F64), *_partial(2, F64))),
    "token_loss": ("token_loss", (*_tokens(), 3, -100)),
    "token_loss-fp64": ("token_loss", (*_tokens(F64), 64, -100)),
}
"""Test id -> family and the arguments of its forward op (before options that some schemas add)."""


def overload(op):
    return getattr(torch.ops.lctx, op).default


def names(op):
    return [argument.name for argument in overload(op)._schema.arguments]


def forward_args(call, requires_grad=False):
    """Fresh arguments of a forward call; `deterministic` is filled in where the schema has it."""
    family, args = FORWARD_CALLS[call]
    op = f"{family}_fwd"
    values = dict(zip(names(op), args, strict=False)) | {"save_local": True, "deterministic": False}
    return [_fresh(values[name], requires_grad) for name in names(op)]


def _fresh(value, requires_grad):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(requires_grad and value.is_floating_point())


def backward_args(call):
    """Arguments of the backward op that belongs to a forward call, with every gradient given."""
    family, _ = FORWARD_CALLS[call]
    args = forward_args(call)
    values = dict(zip(names(f"{family}_fwd"), args, strict=True))
    returns = [r.name for r in overload(f"{family}_fwd")._schema.returns]
    outputs = dict(zip(returns, overload(f"{family}_fwd")(*args), strict=True))
    values |= outputs
    values |= {f"d{name}": rand(*x.shape, dtype=x.dtype, seed=9) for name, x in outputs.items()}
    values |= {f"needs_{name}": True for name in names(f"{family}_fwd")} | {"deterministic": True}
    return [values[name] for name in names(f"{family}_bwd")]


def attention(name, q, k, v, **options):
    """Outputs of a public attention function with options that make sense for short inputs."""
    if name == "flash":
        return lk.flash_attention(q, k, v, window=7, return_lse=True, **options)
    if name == "landmark":
        return lk.landmark_attention(q, k, v, block_size=5, return_lse=True, **options)
    if name == "dilated":
        return lk.dilated_attention(q, k, v, (4, 16), (1, 2), return_lse=True, **options)
    out, mem = lk.infini_attention(q, k, v, segment_len=8, **options)
    return (out, *mem)


class CallLog(TorchDispatchMode):
    """Records every `lctx` op that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lctx":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))

    def count(self, op):
        return sum(name == op for name, _ in self.calls)


def scalar(outputs):
    """A loss in which every output element has another weight."""
    return sum((x * rand(*x.shape, dtype=x.dtype, seed=4)).sum() for x in outputs)


def leaves(dtype=torch.float32, **shape):
    return [x.requires_grad_() for x in qkv(dtype=dtype, **shape)]
