import pytest

from bench.registry import (
    COMPETITORS,
    OPS,
    PASSES,
    TIMED_SUITES,
    Group,
    Shape,
    cpu_reach,
    flops,
    min_bytes,
    op_options,
    parse_shape,
    quick,
)

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
            assert set(group.candidates) <= {*OPS, *COMPETITORS}
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
    ],
)
def test_shapes_are_read(text, shape):
    assert parse_shape(text, Shape(T=1)) == shape


@pytest.mark.parametrize("text", ["", "8q", "8k-x3", "h8/3-1k", "0", "1k-d0", "-1"])
def test_unreadable_shapes_are_refused(text):
    with pytest.raises(ValueError, match="shape"):
        parse_shape(text, Shape(T=1))


def test_flops_of_dense_attention():
    forward = 4 * 8 * 4096**2 * 64 / 2
    assert flops("flash", DENSE, "fwd", {}) == forward
    assert flops("flash", DENSE, "fwd_bwd", {}) == 3.5 * forward
    assert flops("landmark", DENSE, "fwd", {"block_size": 64}) == forward


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
    assert min_bytes("merge", DENSE, "fwd") == 3 * tensor


def test_quick_keeps_the_candidates_and_drops_the_goals():
    group = cpu_reach()[-1]
    assert quick(group) == Group(Shape(T=1024), group.pass_, group.candidates)
