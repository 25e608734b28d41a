"""landmark_decode and infini_decode on a Hopper GPU against their definitions in fp64."""

import pytest
import torch
from decode_cases import (
    INFINI_CASES,
    LANDMARK_CASES,
    SELECT,
    InfiniCase,
    LandmarkCase,
    at,
    check,
)
from gpu_checks import HALF

from lctx_kernels.cache import decode

built = decode._built("landmark_decode", "cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not built, reason="built without CUDA")]


def check_landmark(case, dtype=torch.bfloat16, offload=False, seed=0):
    before, after = (case.tensors(dtype, "cuda", seed) for _ in range(2))
    if offload:
        for name in ("blocks_k", "blocks_v"):
            after[name] = after[name].cpu().pin_memory()
    out, lse, blocks = case.run(after)
    exact = case.exact(before, after)
    assert torch.equal(blocks, exact[2])
    check(case, out, lse, exact, case.keys)
    case.check_open(before, after)


def check_infini(case, dtype=torch.bfloat16, seed=0):
    tensors = case.tensors(dtype, "cuda", seed)
    rooms = case.rooms(tensors)
    out, lse = case.run(tensors, rooms)
    check(case, out, lse, case.exact(tensors), case.segment_len)
    case.check_open(tensors, rooms)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("name", LANDMARK_CASES)
def test_landmark(name, select, dtype):
    check_landmark(at(LANDMARK_CASES[name], select=select), dtype)


@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("name", ["one token", "blocks that are always read", "head size 128"])
def test_landmark_blocks_in_pinned_memory(name, select):
    check_landmark(at(LANDMARK_CASES[name], select=select), offload=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", INFINI_CASES)
def test_infini(name, dtype):
    check_infini(INFINI_CASES[name], dtype)


def test_pageable_memory_is_refused():
    case = LandmarkCase()
    tensors = case.tensors(torch.bfloat16, "cuda")
    tensors["blocks_k"], tensors["blocks_v"] = (tensors[n].cpu() for n in ("blocks_k", "blocks_v"))
    with pytest.raises(ValueError, match="pageable memory; expected pinned"):
        case.run(tensors)


@pytest.mark.parametrize("T", [1, 200, 4000])
def test_every_element_is_written(T):
    """Scratch and outputs come with NaN in them."""
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << n,), 0xFF, dtype=torch.uint8, device="cuda") for n in range(9, 26)]
    del blocks
    for select in SELECT:
        check_landmark(LandmarkCase(count=T, select=select, T=3))
    check_infini(InfiniCase(segment_len=T + 5, open_len=T, T=3))


def test_two_runs_are_bitwise_equal():
    for make in (LANDMARK_CASES["head size 128"], LANDMARK_CASES["many blocks"]):
        for select in SELECT:
            case = at(make, select=select)
            given = case.tensors(torch.bfloat16, "cuda")
            copies = ({n: x if x is None else x.clone() for n, x in given.items()}
                      for _ in range(30))  # fmt: skip
            results = [case.run(tensors) for tensors in copies]
            for other in results[1:]:
                assert all(map(torch.equal, results[0], other))
    case = INFINI_CASES["head size 128"]
    tensors = case.tensors(torch.bfloat16, "cuda")
    results = [case.run(tensors, case.rooms(tensors)) for _ in range(100)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("offload", [False, True])
def test_landmark_replays_in_a_cuda_graph_with_new_inputs(select, offload):
    case = at(LANDMARK_CASES["head size 128"], select=select)
    tensors, new = (case.tensors(torch.bfloat16, "cuda", seed) for seed in (0, 7))
    expected = case.run(dict(new))
    for name in ("blocks_k", "blocks_v") if offload else ():
        tensors[name], new[name] = (x[name].cpu().pin_memory() for x in (tensors, new))
    landmarks = tensors["blocks_k"][..., -1, :].cuda().contiguous()

    def call():
        return decode.landmark_decode(**tensors, landmarks=landmarks, **case.options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for name, x in tensors.items():
        if name != "rope":
            x.copy_(new[name])
    landmarks.copy_(new["blocks_k"][..., -1, :])
    torch.cuda.synchronize()
    for _ in range(3):
        for result in results:
            result.fill_(-7)
        graph.replay()
        assert all(map(torch.equal, results, expected))


def test_infini_replays_in_a_cuda_graph():
    case = INFINI_CASES["head size 128"]
    tensors = case.tensors(torch.bfloat16, "cuda")
    rooms = case.rooms(tensors)
    expected = case.run(tensors, rooms)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.run(tensors, rooms)
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    assert all(map(torch.equal, results, expected))


def test_runs_on_the_current_stream():
    case = LANDMARK_CASES["one token"]
    source = case.tensors(torch.bfloat16, "cuda")
    expected = case.run(case.tensors(torch.bfloat16, "cuda"))
    tensors = {n: torch.zeros_like(x) for n, x in source.items()}
    landmarks = torch.zeros_like(source["blocks_k"][..., -1, :])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for n, x in source.items():
            tensors[n].copy_(x)
        landmarks.copy_(source["blocks_k"][..., -1, :])
        results = decode.landmark_decode(**tensors, landmarks=landmarks, **case.options)
    stream.synchronize()
    assert all(map(torch.equal, results, expected))
