"""What flash_attention alone promises on a Hopper GPU; test_common_cuda.py has the rest."""

import pytest
import torch
from gpu_checks import HALF, check_result, gpu_qkv, needs_kernel

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("flash_fwd")


def check(q, k, v, **options):
    with torch.no_grad():
        result = lk.flash_attention(q, k, v, return_lse=True, **options)
        exact = reference.flash_attention(q.double(), k.double(), v.double(), **options)
    check_result(result, exact, q, k, v)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 96, 128, 136, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_head_dimensions(D, causal, dtype):
    check(*gpu_qkv(2, 333, 4, D, Hkv=2, dtype=dtype), causal=causal)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(
    ("Tq", "Tk"), [(1, 1), (1, 777), (63, 63), (129, 1000), (1000, 129), (700, 701), (192, 384)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths(Tq, Tk, D, causal):
    check(*gpu_qkv(1, Tq, 2, D, Tk=Tk), causal=causal)


@pytest.mark.parametrize("Hkv", [1, 2, 8])
def test_grouped_queries(Hkv):
    check(*gpu_qkv(2, 300, 8, 128, Hkv=Hkv))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 17, 128, 500, 5000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(window, causal, D):
    check(*gpu_qkv(1, 900, 2, D), window=window, causal=causal)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [[0, 700], [0, 1, 1, 65, 256, 700], [0, 0, 192, 384, 699, 700]])
def test_documents(bounds, causal, D):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    q, k, v = gpu_qkv(1, bounds[-1], 4, D, Hkv=2)
    check(q, k, v, cu_seqlens=cu_seqlens, causal=causal)
    check(q, k, v, cu_seqlens=cu_seqlens, causal=causal, window=33)


def test_long_sequences_take_their_own_tile():
    check(*gpu_qkv(1, 300, 2, 128, Tk=9000))
    check(*gpu_qkv(1, 9000, 1, 128, Tk=9000), window=700)
    check(*gpu_qkv(1, 700, 2, 128, Tk=9000), causal=False)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_more_tiles_than_multiprocessors(causal, D):
    """The warpgroups' turns go on from tile to tile, also where the rows of some have ended."""
    check(*gpu_qkv(4, 700, 24, D, Hkv=2), causal=causal)


@pytest.mark.parametrize(("D", "Tk"), [(128, 4200), (256, 900), (104, 5000), (200, 4096)])
@pytest.mark.parametrize("tiles_left", [1, 5, 60])
def test_tiles_of_the_last_round_are_shared(tiles_left, D, Tk):
    """Full masks: a few tiles more than the GPU has multiprocessors."""
    H = torch.cuda.get_device_properties(0).multi_processor_count + tiles_left
    check(*gpu_qkv(1, 100, H, D, Tk=Tk), causal=False)


def test_empty_tensors():
    for B, Tq, Tk in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        q, k, v = gpu_qkv(B, Tq, 4, 64, Tk=Tk)
        out, lse = lk.flash_attention(q, k, v, return_lse=True)
        assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()


def test_wrong_documents_do_not_reach_other_memory():
    q, k, v = gpu_qkv(1, 256, 2, 64)
    bounds = torch.tensor([-50, 100, 90, 100000], dtype=torch.int32, device="cuda")
    lk.flash_attention(q, k, v, cu_seqlens=bounds)
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "expected torch.bfloat16 or torch.fl"),
        (lambda q, k, v: (q[..., :20], k[..., :20], v[..., :20]), "a multiple of 8, at most 256"),
        (lambda q, k, v: (q, k, v[..., :32]), "Dk = 64, Dv = 32 on a GPU"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(NotImplementedError, match=message):
        lk.flash_attention(*change(*gpu_qkv(1, 64, 2, 64)))
    q, k, v = gpu_qkv(1, 64, 2, 64)
    with pytest.raises(NotImplementedError, match="scale is 0 on a GPU; expected a positive"):
        lk.flash_attention(q, k, v, scale=0)


def test_opcheck():
    q, k, v = gpu_qkv(1, 130, 4, 64, Hkv=2)
    torch.library.opcheck(
        torch.ops.lctx.flash_fwd.default, (q, k, v, None, True, 0.125, 0, False),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
