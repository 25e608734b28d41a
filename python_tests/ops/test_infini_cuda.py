"""infini_attention on a Hopper GPU against its definition in fp64."""

import pytest
import torch
from gpu_checks import HALF, baseline, gpu_qkv, needs_kernel
from helpers import assert_close_to_reference, errors, random_memory, random_tensor

import lctx_kernels as lk
from lctx_kernels import reference

pytestmark = needs_kernel("infini_fwd")
UPDATES = ("linear", "delta")


def gpu_memory(q, k, seed=0):
    M, z = random_memory(q.shape[0], k.shape[2], q.shape[3], q.shape[3], q.dtype, seed)
    return M.cuda(), z.cuda()


def gates(q):
    return torch.linspace(-2, 2, q.shape[2], device="cuda")


def apart(q, k):
    """q_mem and k_mem."""
    return {
        "q_mem": random_tensor(*q.shape, dtype=q.dtype, seed=21).cuda(),
        "k_mem": random_tensor(*k.shape, dtype=k.dtype, seed=22).cuda(),
    }


@pytest.fixture(params=["beside", "before"], autouse=True)
def form(request, monkeypatch):
    """Both ways to make the memory, beside attention and before it."""
    monkeypatch.setenv("LCTX_INFINI", request.param)
    parameters = getattr(request.node, "callspec", None)
    D = parameters.params.get("D", 128) if parameters else 128
    if request.param == "beside" and not 64 < D <= 128:
        pytest.skip("one way for this head dimension")
    return request.param


def check_memory(memory, exact, dtype):
    """M within the rounding of 16-bit operands, z of fp32."""
    assert memory.M.dtype == memory.z.dtype == torch.float32
    found, eps = errors(memory.M, exact[0]), torch.finfo(dtype).eps
    assert found.rms <= 0.4 * eps, f"M: rms error {found.rms:.2e}"
    assert found.max <= 4 * eps, f"M: max error {found.max:.2e}"
    torch.testing.assert_close(memory.z.double(), exact[1].double(), rtol=5e-6, atol=1e-5)


def double(x):
    return tuple(y.double() for y in x) if isinstance(x, tuple) else x.double()


def check(q, k, v, **options):
    tensors = {n: x for n, x in options.items() if isinstance(x, torch.Tensor | tuple)}
    exact_options = options | {n: double(x) for n, x in tensors.items()}
    with torch.no_grad():
        out, memory = lk.infini_attention(q, k, v, **options)
        exact = reference.infini_attention(q.double(), k.double(), v.double(), **exact_options)
    assert out.dtype == q.dtype and out.is_contiguous()
    assert_close_to_reference("out", out, exact[0], baseline(q, k, v))
    check_memory(memory, exact[1], q.dtype)
    return out, memory


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [8, 40, 64, 72, 80, 128, 136, 256])
@pytest.mark.parametrize("update", UPDATES)
def test_head_dimensions(update, D, dtype):
    q, k, v = gpu_qkv(2, 700, 4, D, Hkv=2, dtype=dtype)
    check(q, k, v, segment_len=256, update=update, gate=gates(q))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    ("T", "segment_len"),
    [(1, 7), (40, 1), (63, 64), (513, 64), (1000, 100), (257, 300), (900, 449)],
)
def test_lengths(T, segment_len, update, D):
    q, k, v = gpu_qkv(1, T, 2, D)
    check(q, k, v, segment_len=segment_len, update=update, mem=gpu_memory(q, k))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("first", ["gate", "bypass"])
@pytest.mark.parametrize("given", [(), ("gate",), ("mem",), ("q_mem",), ("k_mem",), None])
def test_optional_inputs(given, first, update, D):
    q, k, v = gpu_qkv(2, 500, 4, D, Hkv=2)
    every = {"gate": gates(q), "mem": gpu_memory(q, k), **apart(q, k)}
    options = {n: x for n, x in every.items() if given is None or n in given}
    check(q, k, v, segment_len=192, update=update, first=first, **options)


@pytest.mark.parametrize("Hkv", [1, 2, 8])
@pytest.mark.parametrize("update", UPDATES)
def test_grouped_queries(update, Hkv):
    q, k, v = gpu_qkv(2, 600, 8, 128, Hkv=Hkv)
    check(q, k, v, segment_len=200, update=update, gate=gates(q), **apart(q, k))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("update", UPDATES)
def test_long_memory(update, dtype):
    """Dozens of segments of full length: fp16 must not overflow, the recurrence not drift."""
    q, k, v = gpu_qkv(1, 2048 * 24 + 300, 2, 128, Hkv=1, dtype=dtype)
    k = k + 2
    check(q, k, v, segment_len=2048, update=update)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("update", UPDATES)
def test_many_units(update, D):
    check(*gpu_qkv(3, 2000, 10, D, Hkv=5), segment_len=32, update=update)
    check(*gpu_qkv(30, 200, 8, D, Hkv=4), segment_len=64, update=update)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("update", UPDATES)
def test_repeated_segments_are_learnt(update, D):
    """The same keys and values again: the delta rule finds nothing to add."""
    q, k, v = (x.repeat(1, 4, 1, 1) for x in gpu_qkv(1, 256, 2, D))
    check(q, k, v, segment_len=256, update=update)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("update", UPDATES)
def test_strided_views(update, D):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in gpu_qkv(2, 257, 4, D))
    check(q, k, v, segment_len=100, update=update)
    packed = torch.stack(gpu_qkv(2, 257, 4, D), dim=2)
    q, k, v = packed.unbind(2)
    mixed = {n: x.expand(2, 257, 4, D) for n, x in apart(q[:1], k[:1]).items()}
    with pytest.raises(NotImplementedError, match="strides"):  # batch stride 0
        check(q, k, v, segment_len=100, update=update, **mixed)
    check(q, k, v, segment_len=100, update=update, **apart(q, k))


@pytest.mark.parametrize("D", [64, 128])
def test_unaligned_memory(D):
    q, k, v = gpu_qkv(1, 130, 2, D)
    M, z = gpu_memory(q, k)
    M, z = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (M, z))
    for update in UPDATES:
        check(q, k, v, mem=(M, z), segment_len=64, update=update)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("update", UPDATES)
def test_empty_memory_given(update, D):
    q, k, v = gpu_qkv(1, 200, 2, D)
    M, z = gpu_memory(q, k)
    check(q, k, v, mem=(M * 0, z * 0), segment_len=64, update=update)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("logit", [-200.0, -60.0, 60.0, 200.0])
def test_closed_and_open_gates(logit, D):
    q, k, v = gpu_qkv(1, 200, 2, D)
    gate = torch.full((2,), logit, device="cuda")
    check(q, k, v, segment_len=64, gate=gate, mem=gpu_memory(q, k))


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("update", UPDATES)
def test_pieces_equal_the_whole(update, D, form):
    q, k, v = gpu_qkv(2, 1000, 4, D, Hkv=2)
    options = {"segment_len": 128, "update": update, "gate": gates(q)}
    out, memory = check(q, k, v, **options)
    pieces, carried = [], None
    for rows in (slice(0, 128), slice(128, 640), slice(640, 1000)):
        piece, carried = lk.infini_attention(q[:, rows], k[:, rows], v[:, rows], carried, **options)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), out, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(carried.M, memory.M, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(carried.z, memory.z, rtol=1e-5, atol=1e-5)
    if form == "beside":  # the same sums in the same order
        assert torch.equal(carried.M, memory.M) and torch.equal(carried.z, memory.z)


def forward_op(q, k, v, *, update="linear", segment_len=128, save_local=True, **tensors):
    values = [tensors.get(n) for n in ("q_mem", "k_mem", "M", "z", "gate")]
    return torch.ops.lctx.infini_fwd(
        q, k, v, *values, segment_len, update, "gate", 0, q.shape[-1] ** -0.5, save_local, False
    )


@pytest.mark.parametrize("D", [64, 128])
def test_infinite_values_do_not_reach_earlier_states(D):
    q, k, v = gpu_qkv(1, 300, 2, D)
    clean = forward_op(q, k, v, segment_len=100)[3]
    v[:, 200:] = torch.inf
    M_states = forward_op(q, k, v, segment_len=100)[3]
    assert torch.equal(M_states[:, :, :3], clean[:, :, :3])


@pytest.mark.parametrize("D", [64, 80, 128, 256])
@pytest.mark.parametrize("with_q_mem", [True, False])
def test_what_the_backward_gets(with_q_mem, D):
    q, k, v = gpu_qkv(1, 300, 2, D)
    tensors = {"q_mem": apart(q, k)["q_mem"]} if with_q_mem else {}
    saved = forward_op(q, k, v, update="delta", **tensors)
    out, local, lse, M_states, z_states, M, _, decays = saved
    again = forward_op(q, k, v, update="delta", save_local=False, **tensors)
    assert torch.equal(out, again[0]) and again[1].numel() == 0
    for s, rows in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        part = [x[:, rows] for x in (q, k, v)]
        exact, exact_lse = reference.flash_attention(*(x.double() for x in part))
        assert_close_to_reference("out_local", local[:, rows], exact, baseline(*part))
        torch.testing.assert_close(lse[:, :, rows].double(), exact_lse, rtol=1e-6, atol=4e-6)
        head = (x[:, : rows.start].double() for x in (q, k, v))
        _, (M_exact, z_exact) = reference.infini_attention(*head, segment_len=128, update="delta")
        assert errors(M_states[:, :, s], M_exact).rms < 4e-3
        torch.testing.assert_close(z_states[:, :, s].double(), z_exact, rtol=5e-6, atol=1e-5)
        if s > 0:
            sigma = torch.nn.functional.elu(part[1].double()) + 1
            norm = torch.einsum("bnhd,bhd->bnh", sigma, z_exact)[..., None]
            decay = torch.einsum("bnhd,bnhe->bhde", sigma / norm, sigma)
            assert errors(-decays[:, :, :, s].double().sum(0), decay).rms < 3e-3
    assert M.shape == (1, 2, D, D)


def test_empty_tensors():
    for B, T in ((0, 5), (2, 0)):
        q, k, v = gpu_qkv(B, T, 4, 64)
        M, z = (torch.rand(B, 4, *shape, device="cuda") for shape in ((64, 64), (64,)))
        out, memory = lk.infini_attention(q, k, v)
        assert out.shape == q.shape and (memory.M == 0).all() and (memory.z == 0).all()
        _, memory = lk.infini_attention(q, k, v, (M, z))
        assert torch.equal(memory.M, M) and torch.equal(memory.z, z)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("update", UPDATES)
def test_two_runs_are_bitwise_equal(update, D):
    q, k, v = gpu_qkv(2, 1111, 6, D, Hkv=2)
    first = forward_op(q, k, v, update=update, gate=gates(q))
    for _ in range(5):
        second = forward_op(q, k, v, update=update, gate=gates(q))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("update", UPDATES)
def test_many_runs_beside_attention_are_equal(update, monkeypatch):
    """Sizes that choose by themselves to make states beside attention."""
    monkeypatch.delenv("LCTX_INFINI")
    q, k, v = gpu_qkv(1, 8192, 32, 128, Hkv=8)
    first = lk.infini_attention(q, k, v, update=update)
    for _ in range(20):
        second = lk.infini_attention(q, k, v, update=update)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1].M, second[1].M)


@pytest.mark.parametrize("update", UPDATES)
def test_runs_inside_a_cuda_graph(update):
    q, k, v = gpu_qkv(2, 640, 4, 128)
    eager, memory = lk.infini_attention(q, k, v, segment_len=128, update=update)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, final = lk.infini_attention(q, k, v, segment_len=128, update=update)
    out.zero_()
    for _ in range(3):
        graph.replay()
    assert torch.equal(out, eager) and torch.equal(final.M, memory.M)


def test_refusals():
    q, k, v = gpu_qkv(1, 64, 2, 64)
    with pytest.raises(NotImplementedError, match=r"expected torch\.bfloat16 or torch\.float16"):
        lk.infini_attention(q.float(), k.float(), v.float())
    with pytest.raises(NotImplementedError, match="Dk = 64, Dv = 32 on a GPU"):
        lk.infini_attention(q, k, v[..., :32])


def test_opcheck():
    q, k, v = gpu_qkv(1, 130, 4, 64, Hkv=2)
    for save_local in (True, False):
        torch.library.opcheck(
            torch.ops.lctx.infini_fwd.default,
            (q, k, v, None, None, None, None, None, 64, "delta", "gate", 0, 0.125, save_local,
             False),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
