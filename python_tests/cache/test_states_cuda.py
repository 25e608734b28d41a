"""States of generation on a GPU: against the ops, offloaded against resident, and in models."""

import pytest
import torch
from helpers import random_qkv, random_tensor

import lctx_kernels as lk
from lctx_kernels import nn
from lctx_kernels.cache import (
    DilatedState,
    FlashState,
    InfiniState,
    LandmarkState,
    RetrievalState,
    RopeTable,
    landmark,
    pinned,
)

pytestmark = pytest.mark.cuda
T, CUTS = 700, [300, 1, 1, 63, 250, 85]


def rotary(x, positions):
    return nn.rotary.Rotary(x.shape[-1])(x, positions)


def stepwise(state, q, k, v, cuts=CUTS, **options):
    outs, start = [], 0
    for n in cuts:
        outs.append(state.attend(*(x[:, start : start + n] for x in (q, k, v)), **options))
        start += n
    return torch.cat(outs, dim=1)


def close(ours, want):
    """Both round every output once; what differs is where sums are cut."""
    torch.testing.assert_close(ours.float(), want.float(), rtol=0.02, atol=0.01)


@pytest.fixture
def qkv():
    return [x.cuda() for x in random_qkv(2, T, 8, 64, Hkv=2, dtype=torch.bfloat16)]


@pytest.mark.parametrize(
    ("make", "op"),
    [
        (FlashState, lambda q, k, v: lk.flash_attention(q, k, v)),
        (
            lambda: DilatedState([64, 512], [1, 4]),
            lambda q, k, v: lk.dilated_attention(q, k, v, [64, 512], [1, 4]),
        ),
        (
            lambda: InfiniState(128),
            lambda q, k, v: lk.infini_attention(q, k, v, segment_len=128)[0],
        ),
        (
            lambda: InfiniState(128, "delta"),
            lambda q, k, v: lk.infini_attention(q, k, v, segment_len=128, update="delta")[0],
        ),
        (lambda: LandmarkState(64), lambda q, k, v: lk.landmark_attention(q, k, v, block_size=64)),
    ],
    ids=["flash", "dilated", "infini", "infini, delta", "landmark"],
)
def test_states_are_the_ops(qkv, make, op):
    close(stepwise(make(), *qkv), op(*qkv))


@pytest.fixture(params=["torch's pinned memory", "pages of its own"])
def rooms(request, monkeypatch):
    """Where offloaded blocks lie: small rooms and large ones."""
    if request.param == "pages of its own":
        monkeypatch.setattr(pinned, "LEAST_BYTES", 0)


@pytest.mark.parametrize("select", ["token_and_head", "head", "token"])
def test_retrieval(qkv, select, rooms):
    q, k, v = qkv
    i = torch.arange(T, device="cuda")[:, None]
    want = lk.landmark_attention(rotary(q, i), rotary(k, i), v, block_size=64)
    for offload in (False, True):
        every = RetrievalState(64, 20, select, offload=offload)
        close(stepwise(every, q, k, v, rope=rotary), want)
    few = [
        stepwise(RetrievalState(64, 3, select, offload=offload, max_blocks=6), q, k, v, rope=rotary)
        for offload in (False, True)
    ]
    assert torch.equal(*few) and not torch.equal(few[0], want)


@pytest.mark.parametrize("select", ["token_and_head", "head", "token"])
def test_decoded_tokens(qkv, select, monkeypatch, rooms):
    """Token by token by the op, over every block and over few, resident and offloaded."""
    q, k, v = qkv
    rope = RopeTable.of(rotary, 64, 1500, q)
    i = torch.arange(T, device="cuda")[:, None]
    want = lk.landmark_attention(rotary(q, i), rotary(k, i), v, block_size=64)
    cuts = [300, *[1] * 150, 250]
    calls = []
    decode = landmark.landmark_decode
    monkeypatch.setattr(
        landmark, "landmark_decode", lambda *a, **o: calls.append(1) or decode(*a, **o)
    )
    for top_k in (20, 3):
        resident, offloaded = (
            stepwise(RetrievalState(64, top_k, select, offload=o), q, k, v, cuts=cuts, rope=rope)
            for o in (False, True)
        )
        assert torch.equal(resident, offloaded)
        if top_k == 20:
            close(resident, want)
    assert len(calls) == 4 * 150


def test_offloaded_blocks_are_in_the_memory_of_the_cpu(qkv, rooms):
    state = RetrievalState(64, 3, offload=True)
    stepwise(state, *qkv, rope=rotary)
    assert state.store.k.value.is_pinned()
    rows = state.select(torch.tensor([1, 0]))
    assert rows.store.k.value.is_pinned()
    assert torch.equal(rows.store.k.value, state.store.k.value.flip(0))
    assert state.store.k.value.device.type == "cpu" and state.store.landmarks.is_cuda
    assert state.store.fetch(torch.zeros(2, 1, 1, 1, dtype=torch.int64, device="cuda")).k.is_cuda


@pytest.mark.parametrize("attention", ["full", "infini", "landmark", "dilated"])
def test_models_generate(attention):
    options = {
        "infini": {"segment_len": 64}, "landmark": {"block_size": 16},
        "dilated": {"segment_lengths": [64, 256], "dilation_rates": [1, 2]},
    }  # fmt: skip
    config = nn.LlamaConfig(97, 256, 2, 4, num_kv_heads=2, attention=attention, options=options)
    model = nn.Llama(config).cuda().to(torch.bfloat16).eval()
    ids = torch.randint(97, (2, 150), device="cuda")
    with torch.no_grad():
        whole = model(ids)
        states = model.new_states()
        parts, seen = [], 0
        for part in ids.split([100, 1, 49], dim=1):
            parts.append(model(part, states, seen))
            seen += part.shape[1]
    torch.testing.assert_close(torch.cat(parts, 1).float(), whole.float(), rtol=0.05, atol=0.05)
    assert model.generate(ids, 20).shape == (2, 170)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_time_and_memory_of_a_token_do_not_grow(update):
    state = InfiniState(256, update)
    q, k, v = (random_tensor(1, 256, 4, 64, dtype=torch.bfloat16, seed=s).cuda() for s in range(3))
    sizes = set()
    for _ in range(20):
        state.attend(q, k, v)
        state.attend(q[:, :1], k[:, :1], v[:, :1])
        state.attend(q[:, 1:], k[:, 1:], v[:, 1:])
        sizes.add(torch.cuda.memory_allocated())
    assert len(sizes) <= 2


def test_memory_that_is_not_pinned_leaves_no_error_behind(monkeypatch):
    runtime, pinned_at = torch.cuda.cudart(), []

    class Again:
        """The runtime, asked to pin what it has pinned, which it refuses."""

        def cudaHostRegister(self, *pages):
            pinned_at.append(pages[0])
            assert int(runtime.cudaHostRegister(*pages)) == 0
            return runtime.cudaHostRegister(*pages)

    monkeypatch.setattr(pinned, "LEAST_BYTES", 0)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "cudart", Again)
        with pytest.raises(RuntimeError, match="offload: pinning") as refused:
            pinned.PinnedRoom((1 << 20,), torch.uint8, torch.device("cuda"))
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert int(runtime.cudaHostUnregister(*pinned_at)) == 0, refused  # whose pages are still there
