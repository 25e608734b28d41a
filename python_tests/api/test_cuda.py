"""The public API on a real GPU: what runs, and what is refused with which words."""

import pytest
import torch
from api.op_calls import ATTENTIONS, attention, qkv, rand

import lctx_kernels as lk
from lctx_kernels import _ops

pytestmark = pytest.mark.cuda
MERGE_BUILT = "cuda" in _ops.KERNELS.get("merge_fwd", ())


def gpu(tensors):
    return [x.cuda().requires_grad_() for x in tensors]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_names_the_reference_and_the_reference_runs(name):
    inputs = gpu(qkv())
    with pytest.raises(NotImplementedError, match=r'float32 on a GPU; .*backend="reference"'):
        attention(name, *inputs)
    found = attention(name, *inputs, backend="reference")
    expected = attention(name, *qkv(), backend="reference")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        assert attention(name, *inputs, backend="reference")[0].dtype == torch.bfloat16


def test_cpu_backend_refuses_gpu_tensors():
    with pytest.raises(ValueError, match='backend="cpu" with tensors on cuda:0; expected cpu'):
        lk.flash_attention(*gpu(qkv()), backend="cpu")


def test_mixed_devices_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="k is on cpu but the first tensor is on cuda:0"):
        lk.flash_attention(q.cuda(), k, v)


@pytest.mark.skipif(not MERGE_BUILT, reason="built without CUDA kernels")
@pytest.mark.parametrize("compiled", [False, True])
def test_merge_attention_runs(compiled):
    out, lse = rand(2, 19, 4, 8), rand(2, 4, 19)
    lse[0, 0, :3] = -torch.inf
    inputs = (out, lse, rand(2, 19, 4, 8, seed=1), rand(2, 4, 19, seed=1))
    merge = lk.merge_attention
    merge = torch.compile(merge, fullgraph=True, backend="aot_eager") if compiled else merge

    def results(tensors, merge):
        out, lse = merge(*tensors)
        return out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), tensors)

    found = results(gpu(inputs), merge)
    expected = results([x.requires_grad_() for x in inputs], lk.reference.merge_attention)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.nan_to_num(), rtol=1e-4, atol=1e-5)
