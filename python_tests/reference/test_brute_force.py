"""The definitions against loops over rows, keys and blocks in Python floats."""

import brute_force
import pytest
import torch
from helpers import assert_fp64_equal, random_landmarks, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from lctx_kernels import reference

SHAPES = [(1, 1, 1), (5, 5, 1), (4, 9, 2), (9, 4, 2), (1, 7, 4), (3, 0, 2), (0, 3, 2), (0, 0, 1)]


def check(actual, expected):
    for name, ours, exact in zip(("out", "lse"), actual, expected, strict=True):
        assert_fp64_equal(name, ours, exact)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("Tq", "Tk", "group"), SHAPES)
def test_flash(Tq, Tk, group, window, causal):
    q, k, v = random_qkv(2, Tq, 4, 3, Tk=Tk, Hkv=4 // group, Dv=2)
    options = {"causal": causal, "window": window, "scale": 0.7}
    check(reference.flash_attention(q, k, v, **options), brute_force.flash(q, k, v, **options))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("starts", [[0, 9], [0, 0, 4, 4, 8, 9, 9], [0, 1, 2, 9]])
def test_flash_documents(starts, causal):
    q, k, v = random_qkv(1, 9, 2, 3)
    options = {"causal": causal, "window": 3, "cu_seqlens": torch.tensor(starts, dtype=torch.int32)}
    check(reference.flash_attention(q, k, v, **options), brute_force.flash(q, k, v, **options))


@pytest.mark.parametrize("block_size", [2, 3, 4, 20])
@pytest.mark.parametrize(("Tq", "Tk", "group"), [*SHAPES, (13, 13, 1), (5, 12, 4)])
def test_landmark_regular(Tq, Tk, group, block_size):
    q, k, v = random_qkv(2, Tq, 4, 3, Tk=Tk, Hkv=4 // group, Dv=2)
    options = {"block_size": block_size}
    check(
        reference.landmark_attention(q, k, v, **options), brute_force.landmark(q, k, v, **options)
    )


@settings(max_examples=60)
@given(Tk=st.integers(0, 14), Tq=st.integers(0, 14), density=st.floats(0, 1), data=st.data())
def test_landmark_anywhere(Tk, Tq, density, data):
    q, k, v = random_qkv(2, Tq, 2, 3, Tk=Tk, Hkv=1, Dv=2)
    seed = data.draw(st.integers(0, 1000))
    options = {"is_landmark": random_landmarks(2, Tk, density, seed), "scale": 1.3}
    check(
        reference.landmark_attention(q, k, v, **options), brute_force.landmark(q, k, v, **options)
    )


@settings(max_examples=60)
@given(
    T=st.integers(0, 14),
    branches=st.lists(st.tuples(st.integers(1, 17), st.integers(1, 5)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (5, 1)]),
    causal=st.booleans(),
    head_offset=st.sampled_from(["mod", "block"]),
    padded=st.booleans(),
)
def test_dilated(T, branches, heads, causal, head_offset, padded):
    q, k, v = random_qkv(2, T, heads[0], 3, Hkv=heads[1], Dv=2)
    lengths = torch.tensor([T // 2, T], dtype=torch.int32) if padded else None
    w, r = zip(*branches, strict=True)
    options = {"causal": causal, "head_offset": head_offset, "seqlens": lengths}
    check(
        reference.dilated_attention(q, k, v, w, r, **options),
        brute_force.dilated(q, k, v, w, r, **options),
    )


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("first", ["gate", "bypass"])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(
    ("T", "segment_len", "group"),
    [(9, 4, 1), (8, 4, 2), (5, 8, 4), (3, 1, 2), (1, 1, 1), (0, 4, 2)],
)
def test_infini(T, segment_len, group, carried, first, update):
    q, k, v = random_qkv(2, T, 4, 3, Hkv=4 // group, Dv=2)
    q_mem, k_mem, _ = random_qkv(2, T, 4, 3, Hkv=4 // group, seed=1)
    Hkv = 4 // group
    generator = torch.Generator().manual_seed(2)
    M = torch.randn(2, Hkv, 3, 2, dtype=torch.float64, generator=generator)
    z = torch.rand(2, Hkv, 3, dtype=torch.float64, generator=generator)
    options = {
        "mem": (M, z) if carried else None,
        "gate": torch.linspace(-2, 2, 4, dtype=torch.float64),
        "segment_len": segment_len,
        "update": update,
        "first": first,
    }
    for memory_inputs in ({}, {"q_mem": q_mem}, {"k_mem": k_mem}, {"q_mem": q_mem, "k_mem": k_mem}):
        out, mem = reference.infini_attention(q, k, v, **options, **memory_inputs)
        exact, exact_mem = brute_force.infini(q, k, v, **options, **memory_inputs)
        for name, ours, expected in zip(
            ("out", "M", "z"), (out, *mem), (exact, *exact_mem), strict=True
        ):
            assert_fp64_equal(name, ours, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_ring(window, causal):
    q, k, v = random_qkv(2, 11, 4, 3, Hkv=2, Dv=2)
    positions = [torch.tensor(p) for p in ([0, 1, 9, 10], [4, 2, 3], [], [8, 7, 5, 6])]
    positions = [p.long() for p in positions]
    shards = [[x[:, p] for p in positions] for x in (q, k, v)]
    options = {"causal": causal, "window": window}
    for actual, expected in zip(
        reference.ring_attention(*shards, positions, **options),
        brute_force.ring(*shards, positions, **options),
        strict=True,
    ):
        for ours, exact in zip(actual, expected, strict=True):
            assert_fp64_equal("ring", ours, exact)


def test_merge():
    out_a, out_b, _ = random_qkv(2, 5, 3, 4)
    lse_a, lse_b = out_a[..., 0].mT * 3, out_b[..., 0].mT * 3
    lse_a[0, :, 1:3] = lse_b[0, :, 2:4] = -torch.inf
    actual = reference.merge_attention(out_a, lse_a, out_b, lse_b)
    check(actual, brute_force.merge(out_a, lse_a, out_b, lse_b))
