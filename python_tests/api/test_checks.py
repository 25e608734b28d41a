"""Bad input: every refusal by its message, before any work; supports() gives the same reasons."""

import inspect
import math

import pytest
import torch
from api.op_calls import CallLog, qkv, rand

import lctx_kernels as lk

Q, K, V = qkv()  # (2, 19, 4, 8), (2, 19, 2, 8), (2, 19, 2, 8)
ONE_Q, ONE_K, ONE_V = qkv(B=1)
INT32 = torch.int32


def complete(op, arguments):
    """Arguments of a good call of `op`, replaced where `arguments` says so."""
    good = {"q": Q, "k": K, "v": V}
    if op == "landmark_attention" and not arguments.keys() & {"block_size", "is_landmark"}:
        good["block_size"] = 5
    if op == "dilated_attention":
        good |= {"segment_lengths": (4, 16), "dilation_rates": (1, 2)}
    if op == "merge_attention":
        lse = rand(2, 4, 19)
        good = {"out_a": Q, "lse_a": lse, "out_b": Q, "lse_b": lse}
    return good | arguments


EVERY = ("flash_attention", "infini_attention", "landmark_attention", "dilated_attention")
FOR_ALL_ATTENTIONS = [
    ({"q": Q[0]}, ValueError, "q has 3 dimensions; expected 4: (B, T"),
    ({"k": K[..., None]}, ValueError, "k has 5 dimensions; expected 4: (B, T"),
    ({"q": Q[:, :, :3]}, ValueError, "q has 3 heads, k and v have 2; expected Hq to be a multiple"),
    ({"q": Q[:, :, :1]}, ValueError, "expected Hq to be a multiple of Hkv; nearest is Hq = 2"),
    ({"q": Q[:, :, :0]}, ValueError, "q has 0 heads, k and v have 2; expected at least 1"),
    ({"k": K[..., :4]}, ValueError, "k.shape[3] is 4 but q.shape[3] is 8; expected equal sizes"),
    ({"v": V[:, :7]}, ValueError, "v.shape[1] is 7 but"),
    ({"v": V[:, :, :1]}, ValueError, "v.shape[2] is 1 but k.shape[2] is 2"),
    (
        {"k": K[:1]},
        ValueError,
        "k.shape[0] is 1 but q.shape[0] is 2; expected equal sizes: both are B",
    ),
    ({"v": V[..., :0]}, ValueError, "Dv is 0; expected a head dimension of at least 1"),
    ({"q": Q[..., ::2], "k": K[..., :4], "v": V}, ValueError, "expected stride(-1) == 1"),
    ({"q": Q.mT.contiguous().mT}, ValueError, "try q.contiguous()"),
    (
        {"k": K.double()},
        TypeError,
        "k is float64 but the first tensor is float32; expected one dtype",
    ),
    ({"v": V.bfloat16()}, TypeError, "try v.to(torch.float32)"),
    ({"q": Q.long()}, TypeError, "q is int64; expected float32, float64, bfloat16, float16"),
    ({"q": Q.bool()}, TypeError, "q is bool; expected float32"),
    ({"k": K.to(torch.complex64)}, TypeError, "k is complex64; expected float32"),
    ({"v": V.to(torch.float8_e4m3fn)}, TypeError, "v is float8_e4m3fn; .*nearest is bfloat16"),
    (
        {"k": K.to("meta")},
        ValueError,
        "k is on meta but the first tensor is on cpu; expected one device",
    ),
    ({"q": Q.tolist()}, TypeError, "expected a torch.Tensor"),
    ({"q": None}, TypeError, "q is None; expected a torch.Tensor"),
    ({"q": Q.to_sparse()}, TypeError, "q has layout torch.sparse_coo; expected a dense tensor"),
    (
        {"q": torch.nested.nested_tensor([Q[0], Q[1, :7]], layout=torch.jagged)},
        TypeError,
        "expected a dense tensor; nearest is flash_attention of the rows packed into one",
    ),
    ({"scale": math.inf}, ValueError, "scale is inf; expected a finite number or None"),
    ({"scale": math.nan}, ValueError, "scale is nan; expected a finite number"),
    ({"scale": True}, TypeError, "scale is True; expected a finite number or None"),
    ({"scale": torch.tensor(0.5)}, TypeError, "scale is float32 () cpu; expected a finite number"),
    ({"scale": "0.5"}, TypeError, "scale is '0.5'; expected a finite number"),
    ({"deterministic": 1}, TypeError, "deterministic is 1; expected True or False"),
    (
        {"backend": "gpu"},
        ValueError,
        "backend is 'gpu'; expected one of auto, cuda, cpu, reference",
    ),
    ({"backend": None}, TypeError, "backend is None; expected one of auto, cuda, cpu, reference"),
    ({"backend": "cuda"}, ValueError, 'backend="cuda" with tensors on cpu; expected cuda tensors'),
]
OF_ONE_OP = {
    "flash_attention": [
        ({"causal": 1}, TypeError, "causal is 1; expected True or False"),
        ({"return_lse": None}, TypeError, "return_lse is None; expected True or False"),
        ({"window": 0}, ValueError, "window is 0; expected an int >= 1 or None; nearest is 1"),
        ({"window": 2**63}, ValueError, "an int >= 1 or None, at most 9223372036854775807"),
        ({"window": True}, TypeError, "window is True; expected an int >= 1 or None"),
        ({"window": 4.0}, TypeError, "window is 4.0; expected an int >= 1 or None"),
    ],
    "infini_attention": [
        ({"segment_len": 0}, ValueError, "segment_len is 0; expected an int >= 1"),
        ({"segment_len": True}, TypeError, "segment_len is True; expected an int >= 1"),
        ({"segment_len": None}, TypeError, "segment_len is None; expected an int >= 1"),
        ({"detach_every": -1}, ValueError, "detach_every is -1; expected an int >= 0"),
        ({"detach_every": False}, TypeError, "detach_every is False; expected an int"),
        ({"update": "sum"}, ValueError, "update is 'sum'; expected one of linear, delta"),
        ({"first": "skip"}, ValueError, "first is 'skip'; expected one of gate, bypass"),
        ({"q": Q[:, :7]}, ValueError, "k.shape[1] is 19 but q.shape[1] is 7; .*both are T"),
        ({"q_mem": Q[:, :, :2]}, ValueError, "q_mem.shape[2] is 2 but q.shape[2] is 4"),
        ({"k_mem": K.double()}, TypeError, "k_mem is float64 but the first tensor"),
        ({"q_mem": Q.mT.contiguous().mT}, ValueError, "try q_mem.contiguous()"),
        ({"gate": rand(2)}, ValueError, "gate.shape[0] is 2 but q.shape[2] is 4"),
        ({"gate": rand(4).bfloat16()}, TypeError, "gate is bfloat16; expected float32"),
        ({"gate": 0.5}, TypeError, "gate is 0.5; expected a torch.Tensor"),
        ({"mem": rand(2, 2, 8, 8)}, TypeError, "expected InfiniMemory(M, z) or None"),
        ({"mem": (None, None)}, TypeError, "mem holds None; expected InfiniMemory(M, z)"),
        (
            {"mem": (rand(2, 2, 8, 4), rand(2, 2, 8))},
            ValueError,
            "mem.M.shape[3] is 4 but v.shape[3] is 8; expected equal sizes: both are Dv",
        ),
        (
            {"mem": (rand(2, 4, 8, 8), rand(2, 4, 8))},
            ValueError,
            "mem.z.shape[1] is 4 but k.shape[2] is 2; expected equal sizes: both are Hkv",
        ),
        (
            {"mem": (rand(2, 2, 8, 8), rand(2, 2, 8, 1))},
            ValueError,
            "mem.z has 4 dimensions; expected 3: (B, Hkv, Dk)",
        ),
        (
            {"mem": (rand(2, 2, 8, 8).bfloat16(), rand(2, 2, 8))},
            TypeError,
            "mem.M is bfloat16; expected float32; try mem.M.to(torch.float32)",
        ),
        (
            {"mem": (rand(2, 2, 8, 8), rand(2, 2, 8).double())},
            TypeError,
            "mem.z is float64; expected float32",
        ),
    ],
    "landmark_attention": [
        ({"block_size": 1}, ValueError, "block_size is 1; expected an int >= 2"),
        ({"block_size": True}, TypeError, "block_size is True; expected an int >= 2"),
        ({"block_size": None}, ValueError, "neither of block_size and is_landmark given"),
        (
            {"block_size": 5, "is_landmark": rand(2, 19) > 0},
            ValueError,
            "both of block_size and is_landmark given; expected exactly one",
        ),
        ({"is_landmark": rand(2, 19)}, TypeError, "is_landmark is float32; expected bool"),
        ({"is_landmark": rand(2, 7) > 0}, ValueError, "is_landmark.shape[1] is 7 but k.shape[1]"),
    ],
    "dilated_attention": [
        (
            {"segment_lengths": (4,)},
            ValueError,
            "segment_lengths has 1 entries, dilation_rates has 2; expected one of each per branch",
        ),
        (
            {"segment_lengths": (), "dilation_rates": ()},
            ValueError,
            "segment_lengths is empty; expected at least one branch",
        ),
        ({"dilation_rates": (1, 0)}, ValueError, "dilation_rates[1] is 0; expected an int >= 1"),
        ({"segment_lengths": (0, 4)}, ValueError, "segment_lengths[0] is 0; expected an int >= 1"),
        ({"dilation_rates": (1, 2.0)}, TypeError, "dilation_rates[1] is 2.0; expected an int"),
        ({"dilation_rates": (1, True)}, TypeError, "dilation_rates[1] is True; expected an int"),
        ({"segment_lengths": 4}, TypeError, "segment_lengths is 4; expected a tuple or list"),
        ({"head_offset": "h"}, ValueError, "head_offset is 'h'; expected one of mod, block"),
        ({"mix_grad": "no"}, ValueError, "mix_grad is 'no'; expected one of exact, detached"),
        (
            {"seqlens": torch.tensor([19, 20], dtype=INT32)},
            ValueError,
            "seqlens is [19, 20]; expected lengths from 0 to T = 19",
        ),
        ({"seqlens": torch.tensor([19, 2])}, TypeError, "seqlens is int64; expected int32"),
        ({"seqlens": torch.tensor([19], dtype=INT32)}, ValueError, "seqlens.shape[0] is 1 but q"),
    ],
    "merge_attention": [
        ({"lse_a": rand(2, 19, 4)}, ValueError, "lse_a.shape[1] is 19 but out_a.shape[2] is 4"),
        ({"lse_b": rand(2, 4, 19).bfloat16()}, TypeError, "lse_b is bfloat16; expected float32"),
        ({"out_b": Q.bfloat16()}, TypeError, "out_b is bfloat16 but the first tensor is float32"),
        ({"out_b": Q[:, :7]}, ValueError, "out_b.shape[1] is 7 but out_a.shape[1] is 19"),
        ({"out_a": Q.mT.contiguous().mT}, ValueError, "try out_a.contiguous()"),
    ],
}
DOCUMENTS = [
    (
        [0, 9, 5, 19],
        "cu_seqlens is [0, 9, 5, 19]; expected it to start at 0, never decrease, and end",
    ),
    ([1, 19], "cu_seqlens is [1, 19]; expected it to start at 0"),
    ([0, 18], "and end at T = 19"),
    ([0], "cu_seqlens is [0]; expected it to start at 0"),
    ([], "cu_seqlens is empty"),
]


@pytest.fixture
def no_op_runs():
    with CallLog() as log:
        yield
    assert not log.calls


def check_refusal(op, arguments, error, text):
    """The call raises `error` naming op, reason and every argument; supports() gives the reason."""
    arguments = complete(op, arguments)
    with pytest.raises(error) as raised:
        getattr(lk, op)(**arguments)
    assert type(raised.value) is error
    message = str(raised.value)
    first, *reasons, given = message.split("\n")
    assert first == f"{op} cannot run:"
    assert all(reason.startswith("  - ") and "expected" in reason for reason in reasons)
    *parts, last = text.split(".*")
    for part in (*parts, last):
        assert part in "\n".join(reasons), message
    assert given.startswith("given: ")
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            assert f"{name}={dtype} {tuple(value.shape)} {value.device}" in given
    assert lk.supports(op, **arguments) == [reason.removeprefix("  - ") for reason in reasons]


@pytest.mark.parametrize(("arguments", "error", "text"), FOR_ALL_ATTENTIONS)
@pytest.mark.parametrize("op", EVERY)
def test_refused_by_every_attention(op, arguments, error, text, no_op_runs):
    check_refusal(op, arguments, error, text)


@pytest.mark.parametrize(
    ("op", "arguments", "error", "text"),
    [(op, *case) for op, cases in OF_ONE_OP.items() for case in cases],
)
def test_refused_by_one_op(op, arguments, error, text, no_op_runs):
    check_refusal(op, arguments, error, text)


@pytest.mark.parametrize(("bounds", "text"), DOCUMENTS)
def test_refused_documents(bounds, text, no_op_runs):
    cu_seqlens = torch.tensor(bounds, dtype=INT32)
    arguments = {"q": ONE_Q, "k": ONE_K, "v": ONE_V, "cu_seqlens": cu_seqlens}
    check_refusal("flash_attention", arguments, ValueError, text)


def test_refused_documents_by_shape(no_op_runs):
    bounds = torch.tensor([0, 19], dtype=INT32)
    text = "cu_seqlens is given with B = 2, Tq = 19, Tk = 19; expected B = 1 and Tq = Tk"
    check_refusal("flash_attention", {"cu_seqlens": bounds}, ValueError, text)
    one = {"q": ONE_Q, "k": ONE_K, "v": ONE_V}
    text = "cu_seqlens is int64; expected int32"
    check_refusal("flash_attention", one | {"cu_seqlens": bounds.long()}, TypeError, text)
    text = "cu_seqlens has 2 dimensions; expected 1"
    check_refusal("flash_attention", one | {"cu_seqlens": bounds[None]}, ValueError, text)
    text = "cu_seqlens is [0, 19]; expected a torch.Tensor"
    check_refusal("flash_attention", one | {"cu_seqlens": [0, 19]}, TypeError, text)


@pytest.mark.parametrize("op", EVERY[1:])
def test_context_parallel_arguments_are_checked(op):
    parameters = inspect.signature(getattr(lk, op)).parameters
    for name, given in (("group", 5), ("plan", 7)):
        if name in parameters:
            check_refusal(op, {name: given}, TypeError, f"{name} is {given}")
    if "plan" in parameters:
        plan = {"plan": lk.cp.make_plan(19, 1)}
        nearest = "whole sequence on one device with group=None, plan=None"
        check_refusal(op, plan, ValueError, f"there is no default process group.*{nearest}")


@pytest.mark.parametrize(
    "value", [Q.numpy(), Q.tolist(), [Q, K], lk.cp.make_plan(1 << 14, 64)],
    ids=["array", "list", "tensors", "plan"],
)  # fmt: skip
def test_errors_stay_short_whatever_is_given(value):
    with pytest.raises((TypeError, ValueError)) as raised:
        lk.infini_attention(Q, K, V, mem=value)
    assert len(str(raised.value)) < 1000


def test_all_reasons_at_once():
    reasons = lk.supports(
        "infini_attention", Q[:, :, :3], K.double(), V[0], segment_len=0, update="?", scale=math.nan
    )
    assert len(reasons) == 6
    with pytest.raises(TypeError) as raised:
        lk.infini_attention(
            Q[:, :, :3], K.double(), V[0], segment_len=0, update="?", scale=math.nan
        )
    assert all(reason in str(raised.value) for reason in reasons)


def test_supports_takes_positions_and_names():
    assert lk.supports("flash_attention", Q, K, V, window=3) == []
    assert lk.supports("flash_attention", q=Q, k=K, v=V) == []
    assert lk.supports("dilated_attention", Q, K, V, (4,), (1,)) == []
    assert lk.supports("infini_attention", Q, K, V, (rand(2, 2, 8, 8), rand(2, 2, 8))) == []
    assert lk.supports("merge_attention", Q, rand(2, 4, 19), Q, rand(2, 4, 19)) == []
    assert lk.supports("flash_attention", Q) == [
        "k is None; expected a torch.Tensor",
        "v is None; expected a torch.Tensor",
    ]


def test_supports_refuses_unknown_names():
    with pytest.raises(ValueError, match="no op 'attention'; expected one of flash_attention, "):
        lk.supports("attention", Q, K, V)
    with pytest.raises(TypeError, match="flash_attention has no dropout; expected flash_attention"):
        lk.supports("flash_attention", Q, K, V, dropout=0.1)
    with pytest.raises(TypeError, match="merge_attention has no 5th argument"):
        lk.supports("merge_attention", Q, Q, Q, Q, Q)


def test_ring_attention_without_a_group_names_what_is_missing():
    (text,) = lk.supports("ring_attention", Q, K, V)
    assert "no default process group" in text and 'transport="sim"' in text
    with pytest.raises(ValueError) as raised:
        lk.ring_attention(Q, K, V)
    assert text in str(raised.value)


@pytest.mark.parametrize("backend", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize("op", EVERY)
def test_cuda_tensors_are_refused_with_reasons(op, backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, device="cuda") for x in (Q, K, V))
        arguments = complete(op, {"q": q, "k": k, "v": v, "backend": backend})
        (text,) = lk.supports(op, **arguments)
        error = ValueError if backend == "cpu" else NotImplementedError
        with pytest.raises(error, match="cannot run"):
            getattr(lk, op)(**arguments)
    if backend == "cpu":
        assert text.startswith('backend="cpu" with tensors on cuda:0; expected cpu tensors')
    else:
        hopper = op in lk._checks.HOPPER_OPS  # takes 16 bits; these are fp32
        limit = "torch.float32 on a GPU; expected" if hopper else "no cuda kernel"
        assert (limit in text or f"{op} has no cuda kernel" in text) and "reference" in text


def test_other_devices_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, device="mps") for x in (Q, K, V))
        (text,) = lk.supports("flash_attention", q, k, v)
    assert text.startswith("no kernels for device type mps; expected cpu or cuda; nearest is ")


def test_legal_corners_are_supported():
    assert lk.supports("flash_attention", *qkv(T=0)) == []
    assert lk.supports("flash_attention", *qkv(B=0)) == []
    assert lk.supports("flash_attention", *qkv(T=5, Tq=9)) == []
    assert lk.supports("flash_attention", Q, K, V, scale=0) == []
    assert lk.supports("flash_attention", Q[..., :1], K[..., :1], V[..., ::8]) == []
    assert lk.supports("flash_attention", Q.expand(2, 19, 4, 8), K, V, window=10**9) == []
    assert lk.supports("landmark_attention", Q, K, V, block_size=10**9) == []
    for backend in ("auto", "cpu", "reference"):
        meta = (x.to("meta") for x in (Q, K, V))
        assert lk.flash_attention(*meta, backend=backend).shape == Q.shape
    with torch.inference_mode():
        assert lk.flash_attention(Q, K, V, backend="cpu").shape == Q.shape


def test_empty_inputs_with_odd_strides_run():
    odd = torch.zeros(1).expand(2, 0, 4, 8).requires_grad_()
    out = lk.flash_attention(odd, K[:, :0], V[:, :0])
    out.sum().backward()
    assert out.shape == (2, 0, 4, 8) and odd.grad.shape == odd.shape


def test_fused_landmark_attention_equals_landmark_attention():
    q, k, v = (x.transpose(1, 2) for x in qkv(T=20))
    is_mem = torch.arange(20) % 5 == 4
    expected = lk.landmark_attention(*qkv(T=20), block_size=5, scale=0.3).transpose(1, 2)
    for rows in (is_mem, is_mem[None], is_mem.expand(2, 1, 1, 20)):
        out = lk.fused_landmark_attention(q, k, v, rows, 0.3, 5)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"block_size": 1}, ValueError, "block_size is 1; expected an int >= 2"),
        ({"block_size": 4.0}, TypeError, "block_size is 4.0; expected an int >= 2"),
        ({"block_size": 4}, ValueError, "is_mem is not True exactly at every 4th position"),
        ({"is_mem": rand(20)}, TypeError, "is_mem is float32 (20,) cpu; expected a bool tensor"),
        ({"is_mem": rand(3, 20) > 0}, ValueError, "expected one row or B = 2 rows of Tk = 20"),
        ({"is_mem": rand(2, 7) > 0}, ValueError, "expected one row or B = 2 rows of Tk = 20"),
        ({"k": K[0]}, ValueError, "k is float32 (19, 2, 8) cpu; expected a tensor (B, H, Tk, D)"),
        ({"sm_scale": math.inf}, ValueError, "scale is inf; expected a finite number"),
    ],
)
def test_fused_landmark_attention_refuses(arguments, error, text, no_op_runs):
    q, k, v = (x.transpose(1, 2) for x in qkv(T=20))
    good = {"q": q, "k": k, "v": v, "is_mem": torch.arange(20) % 5 == 4, "block_size": 5}
    with pytest.raises(error) as raised:
        lk.fused_landmark_attention(**(good | arguments))
    assert text in str(raised.value)
