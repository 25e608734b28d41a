"""Which keys the kernels see, for any lengths and options: fp64 results against the definitions."""

import cpu_ops
import torch
from helpers import (
    assert_fp64_equal,
    random_landmarks,
    random_memory,
    random_qkv,
    random_tensor,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import infini_named

from lctx_kernels import reference

HEADS = st.sampled_from([(1, 1), (2, 2), (6, 3), (4, 1), (5, 1)])
LENGTH = st.integers(0, 200)
many = settings(max_examples=60)


def check(implementation, definition, tensors, *args, **options):
    """Outputs and gradients of both agree."""
    tensors = [x.requires_grad_() for x in tensors]
    ours = implementation(*tensors, *args, **options)
    exact = definition(*tensors, *args, **options)
    for name, x, y in zip(("out", "lse"), ours, exact, strict=True):
        assert_fp64_equal(name, x, y)
    grads = [random_tensor(*x.shape, seed=i) for i, x in enumerate(exact)]
    found = torch.autograd.grad(ours, tensors, grads)
    expected = torch.autograd.grad(exact, tensors, grads)
    for name, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        assert_fp64_equal(name, x, y)


@many
@given(Tq=LENGTH, Tk=LENGTH, heads=HEADS, causal=st.booleans(), window=st.integers(1, 220))
def test_windows(Tq, Tk, heads, causal, window):
    qkv = random_qkv(1, Tq, heads[0], 4, Tk=Tk, Hkv=heads[1])
    definition = reference.flash_attention
    check(cpu_ops.flash, definition, qkv, causal=causal, window=window)


@many
@given(
    lengths=st.lists(st.integers(0, 70), max_size=6),
    heads=HEADS,
    causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
)
def test_documents(lengths, heads, causal, window):
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = random_qkv(1, sum(lengths), heads[0], 4, Hkv=heads[1])
    options = {"causal": causal, "window": window, "cu_seqlens": starts}
    check(cpu_ops.flash, reference.flash_attention, qkv, **options)


@many
@given(Tq=LENGTH, Tk=LENGTH, heads=HEADS, block_size=st.integers(2, 210))
def test_regular_landmarks(Tq, Tk, heads, block_size):
    qkv = random_qkv(1, Tq, heads[0], 4, Tk=Tk, Hkv=heads[1])
    check(cpu_ops.landmark, reference.landmark_attention, qkv, block_size=block_size)


@many
@given(Tq=LENGTH, Tk=LENGTH, heads=HEADS, density=st.floats(0, 1), seed=st.integers(0, 99))
def test_landmarks_anywhere(Tq, Tk, heads, density, seed):
    qkv = random_qkv(2, Tq, heads[0], 4, Tk=Tk, Hkv=heads[1])
    flags = random_landmarks(2, Tk, density**3, seed)
    check(cpu_ops.landmark, reference.landmark_attention, qkv, is_landmark=flags)


@many
@given(
    T=LENGTH,
    heads=HEADS,
    branches=st.lists(st.tuples(st.integers(1, 220), st.integers(1, 9)), min_size=1, max_size=4),
    causal=st.booleans(),
    head_offset=st.sampled_from(["mod", "block"]),
    mix_grad=st.sampled_from(["exact", "detached"]),
    pad=st.none() | st.floats(0, 1),
)
def test_dilated_selection(T, heads, branches, causal, head_offset, mix_grad, pad):
    qkv = random_qkv(2, T, heads[0], 4, Hkv=heads[1])
    w, r = zip(*branches, strict=True)
    seqlens = None if pad is None else torch.tensor([T, int(pad * T)], dtype=torch.int32)
    options = {
        "causal": causal,
        "head_offset": head_offset,
        "mix_grad": mix_grad,
        "seqlens": seqlens,
    }
    check(cpu_ops.dilated, reference.dilated_attention, qkv, w, r, **options)


@many
@given(
    T=LENGTH,
    heads=HEADS,
    segment_len=st.integers(1, 210),
    update=st.sampled_from(["linear", "delta"]),
    first=st.sampled_from(["gate", "bypass"]),
    detach_every=st.integers(0, 4),
    carried=st.booleans(),
)
def test_infini_segments(T, heads, segment_len, update, first, detach_every, carried):
    q, k, v = random_qkv(1, T, heads[0], 4, Hkv=heads[1])
    M, z = random_memory(1, heads[1], 4, 4) if carried else (None, None)
    options = {"update": update, "first": first, "detach_every": detach_every}

    def results(function):
        named = infini_named(function, segment_len=segment_len, **options)
        return run(named, {"q": q, "k": k, "v": v, "M": M, "z": z})

    ours, exact = results(cpu_ops.infini), results(reference.infini_attention)
    for name, expected in exact.items():
        assert_fp64_equal(name, ours[name], expected, bound=1e-11)
