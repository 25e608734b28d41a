"""The gradients of infini_attention on a Hopper GPU, with and without a fixed order of sums."""

import pytest
import torch
from cuda_ops import self_attention_gradient_errors
from gpu_checks import HALF, gpu_qkv, gradient_baseline, needs_kernel
from helpers import FEW, assert_close_to_reference, errors, random_memory, random_tensor, run, worse
from op_checks import infini_named

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("infini_bwd")
UPDATES = ("linear", "delta")
deterministic = pytest.mark.parametrize("deterministic", [False, True])
updates = pytest.mark.parametrize("update", UPDATES)


def every_input(q, k, names=("gate",)):
    M, z = random_memory(q.shape[0], k.shape[2], q.shape[3], q.shape[3], q.dtype)
    every = {
        "gate": torch.linspace(-2, 2, q.shape[2]),
        "M": M,
        "z": z,
        "q_mem": random_tensor(*q.shape, dtype=q.dtype, seed=21),
        "k_mem": random_tensor(*k.shape, dtype=k.dtype, seed=22),
    }
    wanted = {*names, *(("M", "z") if "mem" in names else ())}
    return {n: x.cuda() for n, x in every.items() if n in wanted}


def random_cotangents(q, k, state_scale=1.0):
    B, T, Hq, D = q.shape
    Hkv = k.shape[2]
    return {
        "out": random_tensor(B, T, Hq, D, seed=7).to(q),
        "M": random_tensor(B, Hkv, D, D, seed=8, scale=state_scale).cuda().float(),
        "z": random_tensor(B, Hkv, D, seed=9, scale=state_scale).cuda().float(),
    }


def check_small(name, ours, exact, dtype):
    """A gradient that is kept in fp32 has the error of 16-bit operands.

    As in assert_close_to_reference, of few numbers the largest error alone counts.
    """
    eps = torch.finfo(dtype).eps
    found = errors(ours, exact)
    assert ours.dtype == torch.float32
    if ours.numel() >= FEW:
        assert found.rms <= 0.45 * eps, f"{name}: rms error {found.rms:.2e}"
    assert found.max <= 4 * eps, f"{name}: max error {found.max:.2e}"


def check(q, k, v, *, given=("gate",), grads=None, **options):
    tensors = {"q": q, "k": k, "v": v, **every_input(q, k, given)}
    grads = grads or random_cotangents(q, k)
    ours = run(infini_named(lk.infini_attention, **options), tensors, grads)
    options.pop("deterministic", None)
    exact = run(
        infini_named(reference.infini_attention, **options),
        {n: x.double() for n, x in tensors.items()},
        grads,
    )
    # Few positions are no measure: at least 64.
    (_, T, Hq, D), Hkv = q.shape, k.shape[2]
    measured = min(max(T, 64), 1024)
    baseline = self_attention_gradient_errors(measured, Hq, Hkv, D, 1.0, q.dtype, None)
    baseline = worse(baseline, gradient_baseline(q, k, v, grads["out"], causal=True))
    baseline |= {"q_mem": baseline["q"], "k_mem": baseline["k"]}
    for n, x in tensors.items():
        name = "d" + n
        assert ours[name].dtype == x.dtype
        if n in baseline:
            assert_close_to_reference(name, ours[name], exact[name], baseline[n])
        else:
            check_small(name, ours[name], exact[name], q.dtype)
    return ours


@deterministic
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 128, 160, 256])
@updates
def test_head_dimensions(update, D, dtype, deterministic):
    q, k, v = gpu_qkv(2, 700, 4, D, Hkv=2, dtype=dtype)
    check(q, k, v, segment_len=256, update=update, deterministic=deterministic)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
@updates
@pytest.mark.parametrize(
    ("T", "segment_len"),
    [(1, 7), (40, 1), (63, 64), (513, 64), (1000, 100), (257, 300), (900, 449)],
)
def test_lengths(T, segment_len, update, D, deterministic):
    q, k, v = gpu_qkv(1, T, 2, D)
    options = {"segment_len": segment_len, "update": update, "deterministic": deterministic}
    check(q, k, v, given=("gate", "mem"), **options)


@deterministic
@pytest.mark.parametrize("D", [64, 128, 256])
@updates
@pytest.mark.parametrize("first", ["gate", "bypass"])
@pytest.mark.parametrize(
    "given", [(), ("gate",), ("mem",), ("q_mem",), ("k_mem",), ("gate", "mem", "q_mem", "k_mem")]
)
def test_optional_inputs(given, first, update, D, deterministic):
    q, k, v = gpu_qkv(2, 500, 4, D, Hkv=2)
    options = {"segment_len": 192, "update": update, "first": first}
    check(q, k, v, given=given, deterministic=deterministic, **options)


@pytest.mark.parametrize("D", [128, 256])
@pytest.mark.parametrize("Hkv", [1, 2, 8])
@updates
def test_grouped_queries(update, Hkv, D):
    q, k, v = gpu_qkv(2, 600, 8, D, Hkv=Hkv)
    check(q, k, v, given=("gate", "mem", "q_mem"), segment_len=200, update=update)


@pytest.mark.parametrize("D", [64, 256])
@pytest.mark.parametrize("detach_every", [1, 2, 3])
@updates
def test_detached_states(update, detach_every, D):
    q, k, v = gpu_qkv(1, 700, 4, D, Hkv=2)
    options = {"segment_len": 100, "update": update, "detach_every": detach_every}
    ours = check(q, k, v, given=("gate", "mem"), **options)
    if detach_every == 1:  # the returned state is detached too
        assert ours["dM"].abs().max() > 0


@pytest.mark.parametrize("D", [128, 256])
@updates
def test_output_alone(update, D):
    q, k, v = gpu_qkv(2, 600, 4, D, Hkv=2)
    grads = {"out": random_cotangents(q, k)["out"]}
    check(q, k, v, given=("gate", "mem"), grads=grads, segment_len=128, update=update)


@pytest.mark.parametrize("D", [128, 256])
@pytest.mark.parametrize("dtype", HALF)
@updates
def test_long_memory(update, dtype, D):
    """Gradients of states shrink with the length: fp16 must not lose them."""
    q, k, v = gpu_qkv(1, 1024 * 12 + 300, 2, D, Hkv=1, dtype=dtype)
    grads = {"out": random_cotangents(q, k)["out"]}
    check(q, k + 1, v, grads=grads, given=("gate", "k_mem"), segment_len=1024, update=update)


@pytest.mark.parametrize("D", [64, 256])
@pytest.mark.parametrize("logit", [-200.0, -60.0, 60.0, 200.0])
def test_closed_and_open_gates(logit, D):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(1, 200, 2, D))
    gate = torch.full((2,), logit, device="cuda", requires_grad=True)
    out, _ = lk.infini_attention(q, k, v, gate=gate, segment_len=64)
    found = torch.autograd.grad(out.float().square().sum(), (q, k, v, gate))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("D", [128, 256])
@updates
def test_pieces_equal_the_whole(update, D):
    """Gradients flow from piece to piece through the memory that is passed along."""
    q, k, v = (x.requires_grad_() for x in gpu_qkv(1, 640, 4, D, Hkv=2))
    options = {"segment_len": 128, "update": update}
    dout = torch.randn_like(q)
    whole = torch.autograd.grad(lk.infini_attention(q, k, v, **options)[0], (q, k, v), dout)
    head, memory = lk.infini_attention(q[:, :384], k[:, :384], v[:, :384], **options)
    tail, _ = lk.infini_attention(q[:, 384:], k[:, 384:], v[:, 384:], memory, **options)
    pieces = torch.autograd.grad(torch.cat([head, tail], 1), (q, k, v), dout)
    for a, b in zip(pieces, whole, strict=True):
        assert errors(a, b).rms < 4e-3


@pytest.mark.parametrize("D", [64, 128, 256])
@updates
def test_same_bits_from_run_to_run(update, D):
    q, k, v = (x.requires_grad_() for x in gpu_qkv(2, 1500, 4, D, Hkv=2))
    gate = torch.zeros(4, device="cuda", requires_grad=True)
    out, _ = lk.infini_attention(
        q, k, v, gate=gate, segment_len=256, update=update, deterministic=True
    )
    dout, inputs = torch.randn_like(out), (q, k, v, gate)
    first, *others = (torch.autograd.grad(out, inputs, dout, retain_graph=True) for _ in range(100))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@deterministic
def test_empty_tensors(deterministic):
    for B, T in ((0, 5), (2, 0)):
        q, k, v = (x.requires_grad_() for x in gpu_qkv(B, T, 4, 64))
        M, z = (torch.rand(B, 4, *s, device="cuda").requires_grad_() for s in ((64, 64), (64,)))
        out, memory = lk.infini_attention(q, k, v, (M, z), deterministic=deterministic)
        (out.sum() + memory.M.sum() + memory.z.sum()).backward()
        assert q.grad.shape == q.shape and (M.grad == 1).all() and (z.grad == 1).all()
