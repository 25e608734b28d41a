"""Gradients of the definitions against finite differences, and their behaviour on empty rows."""

import pytest
import torch
from helpers import random_memory, random_qkv, random_tensor
from torch.autograd import gradcheck

from lctx_kernels import reference

SEED = 5


def leaves(*tensors):
    return [x.requires_grad_() for x in tensors]


def finite(*tensors):
    """Infinite entries of lse are constants; finite differences cannot subtract them."""
    return tuple(x.masked_fill(x.isinf(), 0) for x in tensors)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 2}, {"cu_seqlens": [0, 2, 2, 5]}]
)
def test_flash(options):
    if "cu_seqlens" in options:
        options = {"cu_seqlens": torch.tensor(options["cu_seqlens"], dtype=torch.int32)}
    q, k, v = leaves(*random_qkv(1, 5, 4, 3, Hkv=2, Dv=2, seed=SEED))
    assert gradcheck(lambda *x: finite(*reference.flash_attention(*x, **options)), (q, k, v))


@pytest.mark.parametrize(("Tq", "Tk"), [(6, 3), (3, 6), (2, 0), (0, 2)])
def test_flash_unequal_lengths(Tq, Tk):
    q, k, v = leaves(*random_qkv(1, Tq, 2, 3, Tk=Tk, Hkv=1, seed=SEED))
    assert gradcheck(lambda *x: finite(*reference.flash_attention(*x)), (q, k, v))


@pytest.mark.parametrize("Tq", [9, 4, 11])
@pytest.mark.parametrize("pattern", ["...|..|.|", "|..||....", ".........", "|||||||||"])
def test_landmark(pattern, Tq):
    is_landmark = torch.tensor([[c == "|" for c in pattern]])
    q, k, v = leaves(*random_qkv(1, Tq, 2, 3, Tk=9, Hkv=1, Dv=2, seed=SEED))
    assert gradcheck(
        lambda *x: finite(*reference.landmark_attention(*x, is_landmark=is_landmark)), (q, k, v)
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_offset", ["mod", "block"])
@pytest.mark.parametrize("lengths", [None, [5]])
def test_dilated(lengths, head_offset, causal):
    lengths = lengths and torch.tensor(lengths, dtype=torch.int32)
    q, k, v = leaves(*random_qkv(1, 7, 4, 3, Hkv=2, Dv=2, seed=SEED))
    options = {"causal": causal, "head_offset": head_offset, "seqlens": lengths}
    assert gradcheck(
        lambda *x: finite(*reference.dilated_attention(*x, [3, 8], [1, 2], **options)), (q, k, v)
    )


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("first", ["gate", "bypass"])
@pytest.mark.parametrize("carried", [False, True])
def test_infini(carried, first, update):
    q, k, v = leaves(*random_qkv(1, 8, 4, 3, Hkv=2, Dv=2, seed=SEED))
    q_mem, k_mem, _ = leaves(*random_qkv(1, 8, 4, 3, Hkv=2, seed=SEED + 1))
    (gate,) = leaves(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64))
    M, z = leaves(*random_memory(1, 2, 3, 2))

    def function(q, k, v, q_mem, k_mem, gate, M, z):
        out, (M, z) = reference.infini_attention(
            q, k, v, (M, z) if carried else None, gate=gate, q_mem=q_mem, k_mem=k_mem,
            segment_len=3, update=update, first=first,
        )  # fmt: skip
        return out, M, z

    assert gradcheck(function, (q, k, v, q_mem, k_mem, gate, M, z))


def test_ring():
    q, k, v = leaves(*random_qkv(1, 7, 2, 3, Hkv=1, seed=SEED))
    positions = [torch.tensor(p).long() for p in ([5, 0], [], [6, 1, 3], [2, 4])]

    def function(q, k, v):
        outs, lses = reference.ring_attention(
            *([x[:, p] for p in positions] for x in (q, k, v)), positions, window=4
        )
        return *outs, *lses

    assert gradcheck(function, (q, k, v))


def test_merge():
    out_a, out_b, _ = random_qkv(1, 4, 2, 3, seed=SEED)
    lse_a, lse_b = random_tensor(2, 1, 2, 4).unbind()

    def function(out_a, lse_a, out_b, lse_b):
        lse_a = lse_a.index_fill(2, torch.tensor([1, 2]), -torch.inf)  # row 2: both sides empty
        lse_b = lse_b.index_fill(2, torch.tensor([2, 3]), -torch.inf)
        return finite(*reference.merge_attention(out_a, lse_a, out_b, lse_b))

    assert gradcheck(function, leaves(out_a, lse_a, out_b, lse_b))


def flash_empty(q, k, v):
    return reference.flash_attention(q, k[:, :2], v[:, :2])


def landmark_empty(q, k, v):
    return reference.landmark_attention(q, k[:, :2], v[:, :2], block_size=2)


def dilated_empty(q, k, v):
    none = torch.tensor([0], dtype=torch.int32)
    return reference.dilated_attention(q, k, v, [4, 8], [2, 1], seqlens=none)


@pytest.mark.parametrize("function", [flash_empty, landmark_empty, dilated_empty])
def test_empty_rows_are_zero_with_zero_gradients(function):
    q, k, v = leaves(*random_qkv(1, 5, 2, 4))
    out, lse = function(q, k, v)
    empty = lse == -torch.inf  # (B, H, T)
    assert empty[:, :, :3].all()
    assert (out.transpose(1, 2)[empty] == 0).all()
    for result in (out, lse):
        grads = torch.autograd.grad(result.sum(), (q, k, v), allow_unused=True, retain_graph=True)
        assert all(x is None or x.isfinite().all() for x in grads)
        assert (grads[0].transpose(1, 2)[empty] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_dtypes(dtype):
    q, k, v = random_qkv(1, 6, 2, 4, dtype=dtype)
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = [
        reference.flash_attention(q, k, v),
        reference.landmark_attention(q, k, v, block_size=2),
        reference.dilated_attention(q, k, v, [4], [2]),
    ]
    for out, lse in [*pairs, reference.merge_attention(*pairs[0], *pairs[1])]:
        assert out.dtype == dtype and lse.dtype == stat
    out, (M, z) = reference.infini_attention(q, k, v, segment_len=4)
    assert out.dtype == dtype and M.dtype == z.dtype == stat
    (out,), (lse,) = reference.ring_attention([q], [k], [v], [torch.arange(6)])
    assert out.dtype == dtype and lse.dtype == stat
