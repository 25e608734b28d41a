import pytest

from bench.memory import NOISE_BYTES, growth, measure
from bench.registry import Shape


def test_small_figures_do_not_count_as_growth():
    assert growth([10, 1000, NOISE_BYTES // 2]) == 1.0
    assert growth([NOISE_BYTES, 0, 16 * NOISE_BYTES]) == 16.0


@pytest.mark.slow
def test_the_dense_definition_is_seen_to_be_quadratic():
    row = measure("flash", "fwd", Shape(T=1024), (512, 1024, 2048), "cpu", "reference")
    if row.status == "unsupported":
        pytest.skip(row.reason)
    assert row.status == "ok"
    assert row.linear is False
    assert row.growth > 6


@pytest.mark.slow
def test_a_candidate_that_cannot_run_is_reported_in_its_row():
    assert measure("flash", "fwd", Shape(T=8), (8, 16), "cpu", "cuda").status in (
        "error",
        "unsupported",
    )
    row = measure("nothing", "fwd", Shape(T=8), (8, 16), "cpu")
    assert row.status == "error"
    assert "nothing" in row.reason
