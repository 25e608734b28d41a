"""States of generation against the ops on the whole sequence."""

import itertools

import pytest
import torch
from helpers import random_landmarks, random_qkv, random_tensor

import lctx_kernels as lk
from lctx_kernels.cache import (
    DilatedState,
    InfiniState,
    LandmarkState,
    RetrievalState,
    RopeTable,
    Rows,
    landmark,
)
from lctx_kernels.cache.buffer import Buffer

T = 37
CUTS = {"one by one": [1] * T, "ragged": [5, 1, 11, 2, 18], "whole": [T]}


def rope(x, positions):
    """Rotates pairs of halves, as Llama."""
    half = x.shape[-1] // 2
    angle = positions.unsqueeze(-1) * 10.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


ROPES = {"function": rope, "table": RopeTable.of(rope, 8, 80, torch.zeros(1, dtype=torch.float64))}


def stepwise(state, tensors, cuts, **options):
    outs, start = [], 0
    for n in cuts:
        tokens = {name: x[:, start : start + n] for name, x in tensors.items()}
        outs.append(state.attend(**tokens, **options))
        start += n
    assert start == tensors["q"].shape[1]
    return torch.cat(outs, dim=1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("first", ["gate", "bypass"])
def test_infini_state_is_the_op(cuts, update, first):
    q, k, v = random_qkv(2, T, 4, 8, Hkv=2, Dv=6)
    q_mem, k_mem = random_tensor(2, T, 4, 8, seed=5), random_tensor(2, T, 2, 8, seed=6)
    gate = random_tensor(4, seed=9)
    options = {"gate": gate, "scale": 0.3}
    want, mem = lk.infini_attention(
        q, k, v, q_mem=q_mem, k_mem=k_mem, segment_len=6, update=update, first=first, **options
    )
    state = InfiniState(6, update, first)
    tensors = {"q": q, "k": k, "v": v, "q_mem": q_mem, "k_mem": k_mem}
    close(stepwise(state, tensors, cuts, **options), want)
    assert state.seen == T and state.length == T % 6
    closed, _ = T // 6 * 6, mem
    _, mem = lk.infini_attention(
        *(x[:, :closed] for x in (q, k, v)), q_mem=q_mem[:, :closed], k_mem=k_mem[:, :closed],
        segment_len=6, update=update, first=first,
    )  # fmt: skip
    close(state.mem.M, mem.M)
    close(state.mem.z, mem.z)


def test_infini_state_is_of_constant_size():
    state = InfiniState(4)
    sizes = set()
    for step in range(40):
        state.attend(*random_qkv(1, 1, 2, 4, seed=step))
        if state.mem is not None:
            sizes.add(sum(x.untyped_storage().nbytes() for x in (*state.mem, *state.open)))
    assert len(sizes) == 1


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("head_offset", ["mod", "block"])
def test_dilated_state_is_the_op(cuts, head_offset):
    q, k, v = random_qkv(2, T, 6, 8, Hkv=2)
    branches = ([3, 8, 64], [1, 3, 5])
    want = lk.dilated_attention(q, k, v, *branches, head_offset=head_offset)
    state = DilatedState(*branches, head_offset)
    close(stepwise(state, {"q": q, "k": k, "v": v}, cuts), want)


def test_a_dilated_token_that_no_branch_selects_gets_zero():
    q, k, v = random_qkv(1, 7, 2, 4)
    out = stepwise(DilatedState([8], [4]), {"q": q, "k": k, "v": v}, [2, 1, 4])
    close(out, lk.dilated_attention(q, k, v, [8], [4]))
    assert (out[:, 2] == 0).all() and (out[:, 0, 0] != 0).all()


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_landmark_state_is_the_op(cuts):
    q, k, v = random_qkv(2, T, 4, 8, Hkv=2)
    want = lk.landmark_attention(q, k, v, block_size=5)
    close(stepwise(LandmarkState(5), {"q": q, "k": k, "v": v}, cuts), want)
    marks = random_landmarks(2, T, 0.2)
    want = lk.landmark_attention(q, k, v, is_landmark=marks)
    tensors = {"q": q, "k": k, "v": v, "is_landmark": marks}
    close(stepwise(LandmarkState(), tensors, cuts), want)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("select", ["token_and_head", "head", "token"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("rotation", ROPES.values(), ids=ROPES)
def test_retrieval_of_every_block_is_the_op(cuts, select, offload, rotation):
    q, k, v = random_qkv(2, T, 4, 8, Hkv=2)
    i = torch.arange(T)[:, None]
    want = lk.landmark_attention(rope(q, i), rope(k, i), v, block_size=5)
    state = RetrievalState(5, top_k=T // 5, select=select, offload=offload)
    close(stepwise(state, {"q": q, "k": k, "v": v}, cuts, rope=rotation), want)


def retrieval_by_hand(q, k, v, cuts, L, top_k, select, max_blocks=None):
    """The paper's section 3.2 as loops over rows, heads and tokens."""
    B, T, Hq, D = q.shape
    G, scale = Hq // k.shape[2], D**-0.5
    out = torch.zeros(B, T, Hq, v.shape[-1], dtype=q.dtype)
    bounds = [0, *itertools.accumulate(cuts)]
    for b, (start, end) in itertools.product(range(B), itertools.pairwise(bounds)):
        stored = list(range(start // L))[-(max_blocks or T) :]
        used = min(top_k, len(stored))
        prefix = (used + (used < len(stored))) * L
        local = start // L * L
        far = stored[: len(stored) - used]
        slots = {n: 0 if n in far else 1 + stored.index(n) - len(far) for n in stored}
        slots = slots if far else {n: i for i, n in enumerate(stored)}
        weights = torch.zeros(end - start, Hq, len(stored), dtype=q.dtype)
        for i, h in itertools.product(range(start, end), range(Hq)):
            query = rope(q[b, i, h], torch.tensor(prefix + i - local))
            for n, block in enumerate(stored):
                mark = k[b, block * L + L - 1, h // G]
                weights[i - start, h, n] = (
                    scale * query @ rope(mark, torch.tensor(slots[block] * L + L - 1))
                )
        if select == "head":
            weights = weights.softmax(-1).amax(0, keepdim=True).expand_as(weights)
        elif select == "token":
            weights = weights.softmax(-1).amax(1, keepdim=True).expand_as(weights)
        for i, h in itertools.product(range(start, end), range(Hq)):
            best = weights[i - start, h].topk(used).indices.sort().values.tolist() if used else []
            chosen = [stored[n] for n in best]
            rows = [n * L + e for n in chosen for e in range(L)] + list(range(local, i + 1))
            places = [
                (m + (bool(far) and n not in far)) * L + e
                for m, n in enumerate(chosen)
                for e in range(L)
            ] + list(range(prefix, prefix + i + 1 - local))
            keys = rope(k[b, rows, h // G], torch.tensor(places))
            query = rope(q[b, i, h], torch.tensor(prefix + i - local))
            one = lk.reference.landmark_attention(
                query[None, None, None], keys[None, :, None], v[b, rows, h // G][None, :, None],
                block_size=L, scale=scale,
            )[0]  # fmt: skip
            out[b, i, h] = one[0, 0, 0]
    return out


@pytest.mark.parametrize("select", ["token_and_head", "head", "token"])
@pytest.mark.parametrize("cuts", [[1] * 26, [3, 9, 1, 13]], ids=["one by one", "chunks"])
@pytest.mark.parametrize("max_blocks", [None, 3])
@pytest.mark.parametrize("rotation", ROPES.values(), ids=ROPES)
def test_retrieval_of_few_blocks(select, cuts, max_blocks, rotation):
    q, k, v = random_qkv(2, 26, 4, 8, Hkv=2)
    for offload in (False, True):
        state = RetrievalState(3, 2, select, offload=offload, max_blocks=max_blocks)
        ours = stepwise(state, {"q": q, "k": k, "v": v}, cuts, rope=rotation)
        close(ours, retrieval_by_hand(q, k, v, cuts, 3, 2, select, max_blocks))


def test_few_tokens_are_decoded_by_the_op_and_only_they(monkeypatch):
    calls = []
    decode = landmark.landmark_decode
    monkeypatch.setattr(
        landmark,
        "landmark_decode",
        lambda q, *a, **o: calls.append(q.shape[1]) or decode(q, *a, **o),
    )
    q, k, v = random_qkv(2, T, 4, 8, Hkv=2)
    tensors = {"q": q, "k": k, "v": v}
    cuts = [17, 1, 4, 15]
    stepwise(RetrievalState(5, 2), tensors, cuts, rope=ROPES["table"])
    assert calls == [1, 2, 2, 3, 5, 5, 2]
    for options in ({"select": "head"}, {"max_blocks": 9}):
        calls.clear()
        stepwise(RetrievalState(5, 2, **options), tensors, cuts, rope=ROPES["table"])
        assert calls == [1]  # the others cross the end of a block
    calls.clear()
    stepwise(RetrievalState(5, 2), tensors, cuts, rope=rope)
    stepwise(RetrievalState(5, 2), tensors | {"q": q.requires_grad_()}, cuts, rope=ROPES["table"])
    assert calls == []


def test_forgotten_blocks_take_no_memory():
    state = RetrievalState(2, 1, max_blocks=4)
    rooms = []
    for step in range(60):
        state.attend(*random_qkv(1, 2, 1, 4, seed=step), rope=rope)
        assert state.store.count == min(step + 1, 4)
        rooms.append(state.store.k.room.shape[1])
    assert max(rooms[30:]) <= 16


def test_room_for_a_long_text_is_made_once():
    state, rooms = RetrievalState(4, 2), set()
    state.attend(*random_qkv(1, 6, 1, 4), rope=rope)
    state.reserve(394)
    for step in range(39):
        state.attend(*random_qkv(1, 10, 1, 4, seed=step), rope=rope)
        rooms.add((state.store.k.room.data_ptr(), state.store.k.room.shape[1]))
    assert state.store.count == 99 and len(rooms) == 2 and max(rooms, key=lambda x: x[1])[1] == 112
    state = RetrievalState(4, 2, max_blocks=8)
    state.reserve(400)
    state.attend(*random_qkv(1, 8, 1, 4), rope=rope)
    assert state.store.k.room.shape[1] == 16


def test_a_text_that_grows_token_by_token_is_copied_rarely():
    buffer, rooms = Buffer(), []
    for token in range(1000):
        buffer.append(torch.full((1, 1, 2), float(token)))
        if not rooms or buffer.room is not rooms[-1]:
            rooms.append(buffer.room)
    assert len(rooms) <= 8  # 16, 32, ..., 1024
    assert torch.equal(buffer.value[0, :, 0], torch.arange(1000.0))


def test_retrieval_in_small_pieces_is_the_same(monkeypatch):
    q, k, v = random_qkv(2, 30, 4, 8, Hkv=2)
    tensors = {"q": q, "k": k, "v": v}
    for select in ("token_and_head", "head", "token"):
        whole = stepwise(RetrievalState(3, 2, select), tensors, [10, 20], rope=rope)
        monkeypatch.setattr("lctx_kernels.cache.landmark.ROW_ELEMENTS", 1)
        close(stepwise(RetrievalState(3, 2, select), tensors, [10, 20], rope=rope), whole)
        monkeypatch.undo()


MAKERS = {
    "infini": (lambda: InfiniState(4, "delta"), {}),
    "dilated": (lambda: DilatedState([4, 16], [1, 2]), {}),
    "landmark": (lambda: LandmarkState(4), {"rope": rope}),
    "retrieval": (lambda: RetrievalState(4, 2), {"rope": rope}),
    "retrieval, decoded": (lambda: RetrievalState(4, 2), {"rope": ROPES["table"]}),
}


@pytest.mark.parametrize("method", MAKERS)
def test_padded_rows_are_what_each_row_is_alone(method):
    make, options = MAKERS[method]
    q, k, v = random_qkv(3, 25, 4, 8, Hkv=2)
    pads = [0, 9, 17]
    rows = Rows(make)
    calls = [(0, 14), (14, 15), (15, 25)]
    outs = []
    for start, end in calls:
        spans = [(min(max(p - start, 0), end - start), end - start) for p in pads]
        spans = None if all(a == 0 for a, _ in spans) else spans
        tokens = [x[:, start:end] for x in (q, k, v)]
        outs.append(rows.attend(*tokens, spans=spans, **options))
    out = torch.cat(outs, dim=1)
    assert rows.lengths(3) == [25 - p for p in pads]
    for row, pad in enumerate(pads):
        assert (out[row, :pad] == 0).all()
        alone, state = [], make()
        for start, end in calls:
            if end > pad:
                part = (x[row : row + 1, max(start, pad) : end] for x in (q, k, v))
                alone.append(state.attend(*part, **options))
        close(out[row : row + 1, pad:], torch.cat(alone, dim=1))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("method", MAKERS)
def test_rows_are_selected_with_all_they_hold(method, ragged):
    make, options = MAKERS[method]
    q, k, v = random_qkv(2, 22, 4, 8)
    spans = [(0, 18), (3, 18)] if ragged else None
    chosen = torch.tensor([1, 1, 0])
    rows = Rows(make)
    rows.attend(*(x[:, :18] for x in (q, k, v)), spans=spans, **options)
    rows.select(chosen)
    after = [
        rows.attend(*(x[chosen, i : i + 2] for x in (q, k, v)), spans=None, **options)
        for i in (18, 20)
    ]
    again = Rows(make)
    again.attend(*(x[:, :18] for x in (q, k, v)), spans=spans, **options)
    want = [
        again.attend(*(x[:, i : i + 2] for x in (q, k, v)), spans=None, **options) for i in (18, 20)
    ]
    close(torch.cat(after, 1), torch.cat(want, 1)[chosen])
    rows.reset()
    assert rows.lengths(2) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", MAKERS)
def test_states_keep_the_dtype(method, dtype):
    make, options = MAKERS[method]
    q, k, v = random_qkv(1, 23, 4, 8, dtype=dtype)
    exact = [x.double() for x in (q, k, v)]
    cuts = [9, 1, 13]
    ours = stepwise(make(), dict(zip("qkv", (q, k, v), strict=True)), cuts, **options)
    want = stepwise(make(), dict(zip("qkv", exact, strict=True)), cuts, **options)
    assert ours.dtype == dtype
    if "retrieval" not in method:  # there, rounding may change which block is best
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), want, rtol=8 * eps, atol=8 * eps)
