"""Every op as PyTorch sees it: registration, fakes, autograd, compile, and what is refused."""

import itertools

import pytest
import torch
from api.op_calls import (
    ATTENTIONS,
    F64,
    FORWARD_CALLS,
    CallLog,
    attention,
    backward_args,
    forward_args,
    leaves,
    names,
    overload,
    qkv,
    rand,
    scalar,
)
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import lctx_kernels as lk

REFUSAL = r"lctx::flash_fwd: {} not supported; .*nearest is the definition in plain PyTorch"


# Registration


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("call", FORWARD_CALLS)
def test_opcheck_forward(call, requires_grad):
    args = forward_args(call, requires_grad)
    torch.library.opcheck(overload(f"{FORWARD_CALLS[call][0]}_fwd"), args)


@pytest.mark.parametrize("call", FORWARD_CALLS)
def test_opcheck_backward(call):
    torch.library.opcheck(overload(f"{FORWARD_CALLS[call][0]}_bwd"), backward_args(call))


@pytest.mark.parametrize("call", ["flash-causal", "infini-all-inputs", "merge", "token_loss"])
def test_opcheck_backward_with_grad(call):
    """All but the check that differentiates: a backward has no backward."""
    args = [
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in backward_args(call)
    ]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = overload(f"{FORWARD_CALLS[call][0]}_bwd")
    torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.parametrize("call", FORWARD_CALLS)
def test_fake_kernels_tell_shape_dtype_strides(call):
    """On meta tensors, forward and backward give what the real kernels give."""
    family = FORWARD_CALLS[call][0]
    for op, args in (("fwd", forward_args(call)), ("bwd", backward_args(call))):
        real = overload(f"{family}_{op}")(*args)
        meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
        fake = overload(f"{family}_{op}")(*meta)
        assert [(x.shape, x.dtype, x.stride()) for x in fake] == [
            (x.shape, x.dtype, x.stride()) for x in real
        ]


# Autograd


@pytest.mark.parametrize("name", ATTENTIONS)
def test_gradients_equal_reference(name):
    inputs = leaves(dtype=F64)
    ours = torch.autograd.grad(scalar(attention(name, *inputs)), inputs)
    theirs = torch.autograd.grad(scalar(attention(name, *inputs, backend="reference")), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("only", ["q", "k", "v"])
def test_gradient_of_one_input_alone(only):
    tensors = dict(zip("qkv", qkv(), strict=True))
    tensors[only].requires_grad_()
    (alone,) = torch.autograd.grad(scalar(attention("flash", **tensors)), tensors[only])
    for x in tensors.values():
        x.requires_grad_()
    together = torch.autograd.grad(scalar(attention("flash", **tensors)), tensors[only])[0]
    assert torch.equal(alone, together)


def test_gradients_that_nobody_wants_are_empty():
    q, k, v = qkv()
    out, lse = torch.ops.lctx.flash_fwd(q, k, v, None, True, 0.5, 0, False)
    saved = (torch.ones_like(out), None, q, k, v, out, lse, None, True, 0.5, 0, False)
    all_of_them = torch.ops.lctx.flash_bwd(*saved)
    for wanted in itertools.product([False, True], repeat=3):
        found = torch.ops.lctx.flash_bwd(*saved, *wanted)
        for x, whole, want in zip(found, all_of_them, wanted, strict=True):
            assert torch.equal(x, whole) if want else x.shape == (0,)


def test_gradient_through_lse_alone():
    q, k, v = leaves(dtype=F64)
    dq, dk, dv = torch.autograd.grad(
        lk.flash_attention(q, k, v, return_lse=True)[1].sum(), (q, k, v), materialize_grads=True
    )
    expected = torch.autograd.grad(
        lk.flash_attention(q, k, v, return_lse=True, backend="reference")[1].sum(), (q, k)
    )
    torch.testing.assert_close((dq, dk), expected)
    assert not dv.any()


def test_gradient_through_memory_alone():
    q, k, v = leaves(dtype=F64)
    M = torch.zeros(2, 2, 8, 8, dtype=F64, requires_grad=True)
    z = torch.ones(2, 2, 8, dtype=F64, requires_grad=True)

    def grads(backend):
        _, mem = lk.infini_attention(
            q, k, v, (M, z), segment_len=8, update="delta", backend=backend
        )
        return torch.autograd.grad(mem.M.cos().sum() + mem.z.sin().sum(), (k, v, M, z))

    for a, b in zip(grads("auto"), grads("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_outputs_that_only_the_backward_reads_have_no_gradient():
    outputs = overload("infini_fwd")(*forward_args("infini-all-inputs", requires_grad=True))
    assert [i for i, x in enumerate(outputs) if x.requires_grad] == [0, 5, 6]  # out, M_out, z_out


def test_expanded_gradient_of_a_sum():
    q, k, v = leaves()
    lk.flash_attention(q, k, v).sum().backward()
    expected = torch.autograd.grad(lk.flash_attention(q, k, v), (q, k, v), torch.ones(2, 19, 4, 8))
    assert all(torch.equal(x.grad, e) for x, e in zip((q, k, v), expected, strict=True))


def test_batched_gradients_equal_a_loop():
    q, k, v = leaves(dtype=F64)
    out = lk.flash_attention(q, k, v)
    douts = rand(3, *out.shape, dtype=F64)
    (together,) = torch.autograd.grad(out, q, douts, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, q, dout, retain_graph=True)[0] for dout in douts]
    assert torch.equal(together, torch.stack(alone))


def test_states_and_lengths_of_any_strides():
    q, k, v = qkv()
    M, z = rand(2, 2, 8, 8), rand(2, 2, 8).abs() + 1
    gate = rand(4)
    expected, _ = lk.infini_attention(q, k, v, (M, z), gate=gate, segment_len=8)
    strided = M.mT.contiguous().mT, z.mT.contiguous().mT
    assert not strided[0].is_contiguous()
    out, _ = lk.infini_attention(
        q, k, v, strided, gate=gate.repeat_interleave(2)[::2], segment_len=8
    )
    assert torch.equal(out, expected)


# Autocast


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_autocast_casts_q_k_v(name, backend):
    inputs = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = attention(name, *inputs, backend=backend)
    expected = attention(name, *(x.bfloat16() for x in inputs), backend=backend)
    assert [x.dtype for x in outputs] == [torch.bfloat16] + [torch.float32] * (len(outputs) - 1)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    grads = torch.autograd.grad(scalar(outputs), inputs)
    assert all(g.dtype == torch.float32 for g in grads)


def test_autocast_leaves_states_alone():
    q, k, v = qkv()
    M, z, gate = rand(2, 2, 8, 8), rand(2, 2, 8).abs() + 1, rand(4)
    with torch.autocast("cpu", torch.float16), CallLog() as log:
        out, mem = lk.infini_attention(q, k, v, (M, z), gate=gate, q_mem=q, k_mem=k, segment_len=8)
    assert out.dtype == torch.float16 and mem.M.dtype == mem.z.dtype == torch.float32
    dtypes = [x.dtype for x in log.calls[0][1] if isinstance(x, torch.Tensor)]
    assert dtypes == [torch.float16] * 5 + [torch.float32] * 3


def test_autocast_unites_dtypes_and_keeps_fp64():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        assert lk.flash_attention(q, k.bfloat16(), v).dtype == torch.bfloat16
        assert lk.supports("flash_attention", q, k.bfloat16(), v) == []
        assert lk.flash_attention(q.double(), k.double(), v.double()).dtype == F64
        out, lse = lk.merge_attention(q, rand(2, 4, 19), q, rand(2, 4, 19))
        assert out.dtype == lse.dtype == torch.float32
    (text,) = lk.supports("flash_attention", q, k.bfloat16(), v)
    assert "expected one dtype" in text


def test_autocast_under_compile():
    torch._dynamo.reset()
    q, k, v = qkv()
    compiled = torch.compile(lk.flash_attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(q, k, v), lk.flash_attention(q, k, v))
    assert compiled(q, k, v).dtype == torch.float32


# Selective activation checkpointing


def contexts():
    return create_selective_checkpoint_contexts(lk.checkpoint_policy)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_checkpoint_policy_saves_what_attention_computed(name):
    inputs = leaves()

    def block(q, k, v):
        return attention(name, q.sin(), k.sin(), v.sin())

    expected = torch.autograd.grad(scalar(block(*inputs)), inputs)
    for context_fn, forwards in ((contexts, 1), (None, 2)):
        options = {} if context_fn is None else {"context_fn": context_fn}
        with CallLog() as log:
            outputs = checkpoint(block, *inputs, use_reentrant=False, **options)
            found = torch.autograd.grad(scalar(outputs), inputs)
        assert log.count(f"{name}_fwd") == forwards
        assert log.count(f"{name}_bwd") == 1
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Determinism


@pytest.fixture
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def backward_argument(name, outputs=1, **options):
    q, k, v = leaves()
    with CallLog() as log:
        scalar(attention("flash", q, k, v, **options)[:outputs]).backward()
    ((_, args),) = [call for call in log.calls if call[0] == "flash_bwd"]
    return args[names("flash_bwd").index(name)]


def test_backward_honours_deterministic_algorithms(deterministic_algorithms):
    assert backward_argument("deterministic") is True


def test_backward_honours_deterministic_argument():
    assert backward_argument("deterministic") is False
    assert backward_argument("deterministic", deterministic=True) is True


def test_gradients_that_nobody_gave_are_not_made_up():
    assert backward_argument("dlse") is None  # no zeros for kernels to add
    assert backward_argument("dlse", outputs=2).shape == (2, 4, 19)


# Refusals


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, q: torch.func.vmap(f)(torch.stack([q, q])),
        lambda f, q: torch.func.grad(lambda q: f(q).sum())(q),
        lambda f, q: torch.func.vjp(f, q),
        lambda f, q: torch.func.jvp(f, (q,), (q,)),
        lambda f, q: torch.func.jacrev(f)(q),
        lambda f, q: torch.func.jacfwd(f)(q),
    ],
    ids=["vmap", "grad", "vjp", "jvp", "jacrev", "jacfwd"],
)
def test_functorch_is_refused_and_reference_is_not(transform):
    q, k, v = qkv(T=3, D=2)
    with pytest.raises(NotImplementedError, match=REFUSAL.format(".* (is|are)")):
        transform(lambda q: lk.flash_attention(q, k, v), q)
    transform(lambda q: lk.flash_attention(q, k, v, backend="reference"), q)


def test_vmap_of_an_op_itself_is_refused():
    q, k, v, *options = forward_args("flash-causal")
    with pytest.raises(NotImplementedError, match=REFUSAL.format("torch.func.vmap is")):
        torch.func.vmap(lambda q: torch.ops.lctx.flash_fwd(q, k, v, *options))(torch.stack([q, q]))


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_is_refused(compiled):
    torch._dynamo.reset()
    q, k, v = qkv()

    def tangent(q):
        with forward_ad.dual_level():
            out = lk.flash_attention(forward_ad.make_dual(q, q), k, v)
            return forward_ad.unpack_dual(out).tangent

    function = torch.compile(tangent, backend="eager") if compiled else tangent
    with pytest.raises(
        NotImplementedError, match=REFUSAL.format("forward-mode differentiation is")
    ):
        function(q)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_double_backward_is_refused(name):
    inputs = leaves()
    (dq,) = torch.autograd.grad(scalar(attention(name, *inputs)), inputs[:1], create_graph=True)
    message = f"lctx::{name}_bwd: double backward is not supported"
    with pytest.raises(NotImplementedError, match=message):
        dq.sum().backward()


def test_double_backward_of_the_reference_works():
    q, k, v = leaves(dtype=F64, T=3, B=1)
    assert torch.autograd.gradgradcheck(
        lambda q: lk.flash_attention(q, k, v, backend="reference"), q
    )


def test_other_objects_beside_gpu_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        k = torch.empty(1, 8, 2, 16, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="q is"):
            lk.flash_attention("text", k, k)
