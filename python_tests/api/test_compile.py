"""torch.compile and torch.export see every public function as one op, gradients included."""

import functools

import pytest
import torch
from api.op_calls import ATTENTIONS, attention, leaves, qkv, rand, scalar
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import lctx_kernels as lk


class AllMethods(torch.nn.Module):
    def forward(self, q, k, v, cu_seqlens):
        out = lk.flash_attention(q, k, v, cu_seqlens=cu_seqlens)
        out = lk.landmark_attention(out, k, v, block_size=4)
        out, mem = lk.infini_attention(out, k, v, segment_len=8)
        return lk.dilated_attention(out, k, v, [8], [2]), mem.M


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_compile_fullgraph(name, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(attention, name), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for T in (19, 30):
        inputs = leaves(T=T)
        eager = attention(name, *inputs)
        traced = compiled(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(traced, eager, strict=True))
        expected = torch.autograd.grad(scalar(eager), inputs)
        found = torch.autograd.grad(scalar(traced), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compile_fullgraph_with_all_options():
    torch._dynamo.reset()
    q, k, v = leaves(B=1)
    cu_seqlens = torch.tensor([0, 4, 19], dtype=torch.int32)
    M, z = rand(1, 2, 8, 8).requires_grad_(), (rand(1, 2, 8).abs() + 1).requires_grad_()
    gate, is_landmark = rand(4).requires_grad_(), torch.arange(19)[None] % 4 == 3

    def block(q, k, v):
        out = lk.flash_attention(q, k, v, cu_seqlens=cu_seqlens, scale=0.5, deterministic=True)
        out, lse = lk.landmark_attention(out, k, v, is_landmark=is_landmark, return_lse=True)
        out, mem = lk.infini_attention(out, k, v, (M, z), gate=gate, k_mem=v, segment_len=8)
        out_b, lse_b = lk.dilated_attention(
            out, k, v, [8], [2], seqlens=cu_seqlens[1:2], head_offset="block", return_lse=True
        )
        out, lse = lk.merge_attention(out, lse, out_b, lse_b)
        return out, lse.exp(), *mem

    inputs = (q, k, v, M, z, gate)
    expected = torch.autograd.grad(scalar(block(q, k, v)), inputs)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(scalar(compiled(q, k, v)), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_compile_with_inductor(tmp_path, monkeypatch):
    # Its cache does not know that a backward has other arguments than when the entry was made.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    inputs = leaves()

    def block(q, k, v):
        outs = [attention(name, q.sin(), k * 2, v.transpose(1, 2).sin().transpose(1, 2))[0]
                for name in ATTENTIONS]  # fmt: skip
        return (sum(outs).cos(),)

    expected = torch.autograd.grad(scalar(block(*inputs)), inputs)
    found = torch.autograd.grad(scalar(torch.compile(block, fullgraph=True)(*inputs)), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_reports_refusals():
    torch._dynamo.reset()
    q, k, v = qkv(Hq=3)
    compiled = torch.compile(lk.flash_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="expected Hq to be a multiple of Hkv"):
        compiled(q, k, v)


def test_bad_documents_under_compile_are_refused_by_the_kernel():
    torch._dynamo.reset()
    q, k, v = qkv(B=1)
    compiled = torch.compile(lk.flash_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens does not run from 0 to T = 19"):
        compiled(q, k, v, cu_seqlens=torch.tensor([0, 30, 19], dtype=torch.int32))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    q, k, v = qkv(T=40, B=1)
    cu_seqlens = torch.tensor([0, 7, 40], dtype=torch.int32)
    T = torch.export.Dim("T", min=9, max=100)
    lengths = ({1: T}, {1: T}, {1: T}, {})
    program = torch.export.export(
        AllMethods(), (q, k, v, cu_seqlens), dynamic_shapes=lengths, strict=strict
    )
    q, k, v = qkv(T=19, B=1)
    cu_seqlens = torch.tensor([0, 5, 19], dtype=torch.int32)
    found, expected = (f(q, k, v, cu_seqlens) for f in (program.module(), AllMethods()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_checkpointing_saves_what_attention_computed():
    torch._dynamo.reset()
    graphs = []

    def record(graph, _):
        graphs.append([n.target for n in graph.graph.nodes if "lctx" in str(n.target)])
        return graph

    def block(q, k, v):
        return lk.flash_attention(q.sin(), k.sin(), v.sin()).cos()

    contexts = functools.partial(create_selective_checkpoint_contexts, lk.checkpoint_policy)
    compiled = torch.compile(
        lambda *x: checkpoint(block, *x, use_reentrant=False, context_fn=contexts),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=record, bw_compiler=record),
    )
    compiled(*leaves()).sum().backward()
    ops = torch.ops.lctx
    assert graphs == [[ops.flash_fwd.default], [ops.flash_bwd.default]]
