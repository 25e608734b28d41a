"""Infini memory carried from call to call, and where `detach_every` cuts the gradient."""

import pytest
import torch
from helpers import assert_fp64_equal, random_memory, random_qkv, random_tensor, run

from lctx_kernels.reference import infini_attention

T, SEGMENT = 22, 4


def tensors(carried):
    q, k, v = random_qkv(2, T, 4, 5, Hkv=2, Dv=3)
    q_mem, k_mem, _ = random_qkv(2, T, 4, 5, Hkv=2, seed=1)
    gate = torch.linspace(-1, 1, 4, dtype=torch.float64)
    M, z = random_memory(2, 2, 5, 3)
    names = {"q": q, "k": k, "v": v, "q_mem": q_mem, "k_mem": k_mem, "gate": gate}
    return {**names, "M": M, "z": z} if carried else names


def in_pieces(lengths, **options):
    """Call on consecutive pieces of the sequence, handing the memory on."""

    def function(gate, M=None, z=None, **sequences):
        mem = None if M is None else (M, z)
        outs, start = [], 0
        for n in lengths:
            piece = {name: x[:, start : start + n] for name, x in sequences.items()}
            out, mem = infini_attention(**piece, mem=mem, gate=gate, segment_len=SEGMENT, **options)
            outs.append(out)
            start += n
        assert start == T
        return {"out": torch.cat(outs, 1), "M": mem[0], "z": mem[1]}

    return function


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("first", ["gate", "bypass"])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("lengths", [[4, 8, 10], [4, 4, 4, 4, 4, 2], [20, 2], [8, 0, 14]])
def test_pieces_equal_the_whole(lengths, carried, first, update):
    options = {"update": update, "first": first}
    whole = run(in_pieces([T], **options), tensors(carried))
    pieces = run(in_pieces(lengths, **options), tensors(carried))
    for name, expected in whole.items():
        assert_fp64_equal(name, pieces[name], expected)


def test_no_tokens_return_the_memory_unchanged():
    q, k, v = random_qkv(2, 0, 4, 5, Hkv=2, Dv=3)
    M, z = random_memory(2, 2, 5, 3)
    out, mem = infini_attention(q, k, v, (M, z))
    assert out.shape == (2, 0, 4, 3)
    assert torch.equal(mem[0], M) and torch.equal(mem[1], z)
    _, (M, z) = infini_attention(q, k, v)
    assert M.shape == (2, 2, 5, 3) and z.shape == (2, 2, 5)
    assert (M == 0).all() and (z == 0).all()


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_detach_every(n, update):
    """The reference is the same call in pieces of n segments with the memory detached between."""

    def cut_by_hand(gate, M, z, **sequences):
        mem, outs = (M, z), []
        for start in range(0, T, n * SEGMENT):
            piece = {name: x[:, start : start + n * SEGMENT] for name, x in sequences.items()}
            out, mem = infini_attention(
                **piece, mem=mem, gate=gate, segment_len=SEGMENT, update=update
            )
            outs.append(out)
            if start + (n - 1) * SEGMENT < T:  # this piece had all of its n segments
                mem = tuple(x.detach() for x in mem)
        return {"out": torch.cat(outs, 1), "M": mem[0], "z": mem[1]}

    names = tensors(carried=True)
    cut = run(in_pieces([T], update=update, detach_every=n), names)
    expected = run(cut_by_hand, names)
    never = run(in_pieces([T], update=update), names)
    for name, exact in expected.items():
        assert_fp64_equal(name, cut[name], exact)
    for name in ("out", "M", "z"):
        assert torch.equal(cut[name], never[name])
    segments = -(-T // SEGMENT)
    assert torch.equal(cut["dk_mem"], never["dk_mem"]) == (n > segments)


def test_detach_every_one_gives_the_writer_no_gradient():
    cotangents = {"out": random_tensor(2, T, 4, 3)}
    grads = run(in_pieces([T], detach_every=1), tensors(carried=True), cotangents)
    assert (grads["dk_mem"] == 0).all()
    for name in ("dM", "dz", "dgate", "dq_mem"):  # the incoming memory is read by segment 0
        assert (grads[name] != 0).any()
