"""landmark_decode and infini_decode on the CPU against their definitions in fp64."""

import inspect
import sys

import pytest
import torch
from decode_cases import INFINI_CASES, LANDMARK_CASES, SELECT, InfiniCase, LandmarkCase, at, check
from helpers import ALL_DTYPES

from lctx_kernels import reference
from lctx_kernels.cache import decode

FAST = {n: c for n, c in LANDMARK_CASES.items() if n not in ("many blocks", "head size 256")}


def compare(case, dtype, equal_blocks=False):
    before, after = case.tensors(dtype), case.tensors(dtype)
    for tensors in (before, after):
        if equal_blocks:
            tensors["blocks_k"][...] = tensors["blocks_k"][:, :1].clone()
    out, lse, blocks = case.run(after)
    exact = case.exact(before, after)
    assert torch.equal(blocks, exact[2])
    check(case, out, lse, exact, case.keys)
    case.check_open(before, after)
    return blocks


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("name", FAST)
def test_landmark(name, select, dtype, poisoned_memory):
    compare(at(FAST[name], select=select, D=FAST[name].D // 4 * 2, Dv=10), dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", INFINI_CASES)
def test_infini(name, dtype, poisoned_memory):
    case = at(INFINI_CASES[name], D=INFINI_CASES[name].D // 4, Dv=10)
    tensors = case.tensors(dtype)
    rooms = case.rooms(tensors)
    out, lse = case.run(tensors, rooms)
    check(case, out, lse, case.exact(tensors), case.segment_len)
    case.check_open(tensors, rooms)


@pytest.mark.parametrize("select", SELECT)
def test_of_equal_scores_the_later_block_wins(select):
    case = LandmarkCase(select=select, count=20, top_k=3, rope=False)
    blocks = compare(case, torch.float64, equal_blocks=True)
    assert blocks.unique().tolist() == [17, 18, 19]


BUGS = {
    "landmarks scored where they are": (
        "start = L * (n - (count - used)", "start = 0 * (n - (count - used)"
    ),
    "far blocks have places of their own": ("(chosen >= count - used)", "(chosen >= 0)"),
    "the last block is a candidate": ("past_k[:, :count, :, -1]", "past_k[:, always:, :, -1]"),
    "the first of equals": (
        "scores.argsort(dim=-1, stable=True)[..., count - used :]",
        "scores.argsort(dim=-1, descending=True, stable=True)[..., :used]",
    ),
    "the least scores": ("[..., count - used :]", "[..., :used]"),
    "a choice by scores instead of shares": (".log_softmax(-1).amax(", ".amax("),
    "heads tiled instead of grouped": (
        "x.to(stat).repeat_interleave(Hq // Hkv, dim=d)",
        "torch.cat([x.to(stat)] * (Hq // Hkv), dim=d)",
    ),
    "the landmark's value read": ("scores[..., :-1].softmax(-1), values[..., :-1, :]",
                                  "scores.softmax(-1), values"),
    "the open block's landmark seen": ("(j < L - 1)", "(j < L)"),
    "new tokens see later ones": ("(j <= inside)", "(j <= inside + 1)"),
    "new keys not rotated": ("for x in (rotate(k, inside), v)", "for x in (k, v)"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug, monkeypatch):
    """Bugs in the definition, which the op then differs from."""
    old, new = BUGS[bug]
    source = inspect.getsource(sys.modules[reference.landmark_decode.__module__])
    assert source.count(old) == 1
    space = {}
    exec(source.replace(old, new), space)
    monkeypatch.setattr(reference, "landmark_decode", space["landmark_decode"])
    with pytest.raises(AssertionError):
        for select in SELECT:
            for name in ("one token", "closes the block", "blocks that are always read"):
                compare(at(LANDMARK_CASES[name], select=select, D=8), torch.float64)
            compare(LandmarkCase(rope=False, D=8), torch.float64, equal_blocks=True)


BAD = {
    "a block that is full": ({"open_len": 16}, {}, "open_len = 16 and 1 new tokens"),
    "no blocks": ({"top_k": 0}, {}, "top_k = 0"),
    "more that are always read": ({"always": 51}, {}, "always = 51"),
    "another choice": ({"select": "row"}, {}, 'select = "row"'),
    "a short table": ({}, {"rope": torch.zeros(2, 9, 64)}, "rope has 9 places"),
    "another dtype": ({}, {"blocks_v": torch.zeros(2, 50, 2, 16, 64)}, "blocks_v does not fit"),
    "fewer blocks": ({}, {"blocks_k": torch.zeros(2, 49, 2, 16, 64, dtype=torch.float64)},
                     "blocks_k does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_calls_are_refused_before_any_work(what):
    options, tensors, message = BAD[what]
    case = LandmarkCase()
    given = case.tensors(torch.float64)
    landmarks = given["blocks_k"][..., -1, :].contiguous()
    changed = {n: x.double() if n == "rope" else x for n, x in tensors.items()}
    with pytest.raises(ValueError, match=message):
        decode.landmark_decode(**given | changed, landmarks=landmarks, **case.options | options)
    assert given["open_k"][:, :, 5:].isnan().all()


@pytest.mark.parametrize("select", SELECT)
def test_opcheck(select):
    """Schemas name what is written; fake kernels tell shapes, dtypes and strides."""
    case = LandmarkCase(select=select, T=2, D=8)
    x = case.tensors(torch.float64)
    open_k, open_v = (x[n].nan_to_num() for n in ("open_k", "open_v"))
    landmarks = x["blocks_k"][..., -1, :].contiguous()
    tensors = (x["q"], x["k"], x["v"], landmarks, x["blocks_k"], x["blocks_v"], open_k, open_v)
    options = (x["rope"], 5, 3, 0, select, 0.3)
    utils = ("test_schema", "test_faketensor")
    op = torch.ops.lctx.landmark_decode.default
    torch.library.opcheck(op, (*tensors, *options), test_utils=utils)
    case = InfiniCase(T=2, D=8)
    x = case.tensors(torch.float64)
    new = (x[n][:, case.open_len :] for n in ("q", "k", "v", "q_mem", "k_mem"))
    rooms = (room.nan_to_num() for room in case.rooms(x))
    tensors = (*new, *rooms, *x["mem"], x["gate"])
    op = torch.ops.lctx.infini_decode.default
    torch.library.opcheck(op, (*tensors, case.open_len, False, 0.3), test_utils=utils)


def test_gradients_are_refused():
    case = LandmarkCase()
    tensors = case.tensors(torch.float64)
    tensors["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="landmark_decode has no backward"):
        case.run(tensors)
    with torch.no_grad():
        case.run(tensors)
