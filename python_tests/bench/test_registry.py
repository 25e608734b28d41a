from dataclasses import replace

import pytest

from bench.hopper import hopper, hopper_scaling
from bench.registry import (
    COMPETITORS,
    OPS,
    PASSES,
    VARIANTS,
    Group,
    Shape,
    flops,
    min_bytes,
    op_of,
    op_options,
    parse_shape,
    quick,
)
from bench.suites import TIMED_SUITES, cpu_reach

DENSE = Shape(T=4096, Hq=8, Hkv=8, D=64)


def test_the_cpu_suite_holds_the_goals_and_nothing_else():
    goals = {
        (g.shape.T, g.shape.D, g.pass_, goal.candidate, goal.versus, goal.speed)
        for g in cpu_reach()
        for goal in g.goals
    }
    dense = {
        (T, D, p, "flash", "sdpa", 0.8) for T in (2048, 8192) for D in (64, 128) for p in PASSES
    }
    long = {("infini", "sdpa", 6.0), ("dilated", "sdpa", 3.0), ("landmark", "flash", 0.8)}
    assert goals == dense | {(16384, 64, p, *goal) for p in PASSES for goal in long}
    assert all(
        (g.shape.B, g.shape.Hq, g.shape.Hkv, g.shape.dtype) == (1, 8, 8, "fp32")
        for g in cpu_reach()
    )


def test_the_cpu_options_are_those_of_the_goals():
    assert op_options("infini", "cpu") == {"segment_len": 1024}
    assert op_options("landmark", "cpu") == {"block_size": 64}
    branches = {"segment_lengths": [2048, 4096, 8192, 16384], "dilation_rates": [1, 2, 4, 8]}
    assert op_options("dilated", "cpu") == branches


def test_suites_name_known_candidates_and_compare_within_a_group():
    for groups in (make() for suites in TIMED_SUITES.values() for make in suites.values()):
        assert len(set(groups)) == len(groups)
        for group in groups:
            assert set(group.candidates) <= {*OPS, *VARIANTS, *COMPETITORS}
            compared = {name for goal in group.goals for name in (goal.candidate, goal.versus)}
            assert compared <= set(group.candidates)
            assert len(group.candidates) > 1


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("8k", Shape(T=8192)),
        ("1000", Shape(T=1000)),
        ("b2-t4k-h32/8-d128-bf16", Shape(T=4096, B=2, Hq=32, Hkv=8, D=128, dtype="bf16")),
        ("4k-h4", Shape(T=4096, Hq=4, Hkv=4)),
        ("q1-64k-h32/8", Shape(T=65536, Hq=32, Tq=1)),
        ("4k-full", Shape(T=4096, causal=False)),
    ],
)
def test_shapes_are_read(text, shape):
    assert parse_shape(text, Shape(T=1)) == shape


@pytest.mark.parametrize("text", ["", "8q", "8k-x3", "h8/3-1k", "0", "1k-d0", "-1", "q9-8", "q0-8"])
def test_unreadable_shapes_are_refused(text):
    with pytest.raises(ValueError, match="shape"):
        parse_shape(text, Shape(T=1))


def test_flops_of_dense_attention():
    forward = 4 * 8 * 4096**2 * 64 / 2
    assert flops("flash", DENSE, "fwd", {}) == forward
    assert flops("flash", DENSE, "fwd_bwd", {}) == 3.5 * forward
    assert flops("flash", DENSE, "bwd", {}) == 2.5 * forward
    assert flops("landmark", DENSE, "fwd", {"block_size": 64}) == forward


def test_flops_follow_the_mask_and_the_queries():
    causal = flops("flash", DENSE, "fwd", {})
    assert flops("flash", replace(DENSE, causal=False), "fwd", {}) == 2 * causal
    assert flops("flash", replace(DENSE, Tq=1), "fwd", {}) == 4 * 8 * 4096 * 64
    assert flops("local", DENSE, "fwd", {}) == 2 * flops("flash", replace(DENSE, T=2048), "fwd", {})
    assert flops("local", replace(DENSE, T=100), "fwd", {}) == 2 * 8 * 100**2 * 64


def test_one_branch_over_everything_is_dense():
    one = {"segment_lengths": [4096], "dilation_rates": [1]}
    wider = {"segment_lengths": [1 << 20], "dilation_rates": [1]}
    assert flops("dilated", DENSE, "fwd", one) == flops("flash", DENSE, "fwd", {})
    assert flops("dilated", DENSE, "fwd", wider) == flops("dilated", DENSE, "fwd", one)


def test_dilated_flops_are_linear_in_length_and_fall_with_the_square_of_the_rate():
    def work(T, w, r):
        return flops("dilated", Shape(T=T), "fwd", {"segment_lengths": [w], "dilation_rates": [r]})

    assert work(8192, 1024, 2) == 2 * work(4096, 1024, 2)
    assert work(4096, 1024, 1) == 4 * work(4096, 1024, 2)


def test_infini_flops_are_local_attention_plus_the_memory():
    local, memory = 2 * 8 * 4096 * 1024 * 64, 2 * (8 + 8) * 4096 * 64 * 64
    options = {"segment_len": 1024}
    assert flops("infini", DENSE, "fwd", options) == local + memory
    assert flops("infini", DENSE, "fwd_bwd", options) == 3.5 * local + 3 * memory
    delta = flops("infini", DENSE, "fwd", options | {"update": "delta"})
    assert delta == local + memory * 1.5


def test_bytes_count_inputs_and_outputs_once():
    tensor = 4096 * 8 * 64 * 4
    assert min_bytes("flash", DENSE, "fwd") == 4 * tensor
    assert min_bytes("flash", DENSE, "fwd_bwd") == 12 * tensor
    assert min_bytes("flash", DENSE, "bwd") == 8 * tensor
    assert min_bytes("merge", DENSE, "fwd") == 3 * tensor
    decode = replace(DENSE, Tq=1, Hkv=2)
    assert min_bytes("flash", decode, "fwd") == 2 * tensor // 4 + 2 * tensor // 4096
    assert min_bytes("copy", decode, "fwd") == 8 << 30


def test_quick_is_short_even_for_a_million_tokens():
    assert quick(Group(Shape(T=1 << 20), "fwd", ("flash",))).shape.T == 2048


def test_quick_keeps_the_candidates_and_drops_the_goals():
    group = cpu_reach()[-1]
    assert quick(group) == Group(Shape(T=1024), group.pass_, group.candidates)


@pytest.mark.parametrize(
    ("candidate", "op"),
    [
        ("sdpa-cudnn", "flash"),
        ("flash_carry", "flash"),
        ("landmark", "landmark"),
        ("torch-merge", "merge"),
        ("local-sdpa-cudnn-expanded", "local"),
        ("copy", "copy"),
    ],
)
def test_every_candidate_has_the_work_of_an_operation(candidate, op):
    assert op_of(candidate) == op


def test_the_hopper_goals():
    """The table of goals, by label: shapes, speed, aim."""
    found = {}
    for group in hopper():
        for goal in group.goals:
            key = (goal.label, goal.candidate, goal.versus)
            found.setdefault(key, []).append((group.shape.T, goal.speed, goal.aim))
    lines = {key: [T for T, _, _ in rows] for key, rows in found.items()}
    assert lines["flash, D 128, causal", "flash", "sdpa-cudnn"] == [4096 << i for i in range(5)]
    assert lines["dilated, D 64", "dilated", "local-sdpa-cudnn"][-1] == 1 << 20
    assert ("infini, delta, Hkv 8", "infini", "local-sdpa-cudnn-expanded") in lines
    assert len(lines) == 6 + 4 + 1 + 6 + 1 + 6
    for rows in found.values():
        assert all(aim is None or aim > speed for _, speed, aim in rows)
    assert all(group.shape.B * group.shape.T >= 8192 for group in hopper())


def test_time_against_length_reaches_a_million_tokens():
    lengths = {name: [] for name in ("flash", "landmark", "dilated", "infini", "sdpa-cudnn")}
    for group in hopper_scaling():
        for name in set(group.candidates) & set(lengths):
            if group.shape.D == 128 and group.pass_ == "fwd":
                lengths[name].append(group.shape.T)
    assert lengths["infini"] == lengths["dilated"] == [2048 << i for i in range(10)]
    assert lengths["flash"] == lengths["landmark"] == lengths["sdpa-cudnn"]
    assert lengths["flash"][-1] == 1 << 18
