"""landmark_decode and infini_decode on the CPU against their definitions in fp64."""

import pytest
import torch
from decode_cases import INFINI_CASES, LANDMARK_CASES, SELECT, LandmarkCase, at, check
from helpers import ALL_DTYPES

from lctx_kernels.cache import decode

FAST = {n: c for n, c in LANDMARK_CASES.items() if n not in ("many blocks", "head size 256")}


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("name", FAST)
def test_landmark(name, select, dtype, poisoned_memory):
    case = at(FAST[name], select=select, D=FAST[name].D // 4 * 2, Dv=10)
    before, after = case.tensors(dtype), case.tensors(dtype)
    out, lse, blocks = case.run(after)
    exact = case.exact(before, after)
    assert torch.equal(blocks, exact[2])
    check(case, out, lse, exact, case.keys)
    case.check_open(before, after)


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
    tensors = case.tensors(torch.float64)
    tensors["blocks_k"][...] = tensors["blocks_k"][:, :1]
    assert case.run(tensors)[2].unique().tolist() == [17, 18, 19]


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


def test_gradients_are_refused():
    case = LandmarkCase()
    tensors = case.tensors(torch.float64)
    tensors["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="landmark_decode has no backward"):
        case.run(tensors)
    with torch.no_grad():
        case.run(tensors)
