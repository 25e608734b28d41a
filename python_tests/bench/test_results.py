import dataclasses
import json

import pytest

from bench.hopper_tables import rivals_table
from bench.registry import Goal, Group, Shape
from bench.results import Document, MemoryRow, Row, goal_results, load, parse
from lctx_kernels._measure import write_json

SHAPE = dataclasses.asdict(Shape(T=128))


def row(**changes):
    values = {"candidate": "flash", "op": "flash", "pass_": "fwd", "shape": SHAPE, "status": "ok"}
    return Row(**values | {"median_s": 0.5} | changes)


def memory(**changes):
    shape = {k: v for k, v in SHAPE.items() if k != "T"}
    values = {
        "candidate": "flash",
        "pass_": "fwd",
        "shape": shape,
        "lengths": [1, 2],
        "status": "ok",
    }
    return MemoryRow(**values | {"extra_bytes": [1, 2], "growth": 1.0, "linear": True} | changes)


def document(**parts):
    return Document("reach", {"kind": "cpu"}, **parts)


def test_a_document_survives_the_file(tmp_path):
    group = Group(Shape(T=128), "fwd", ("sdpa", "flash"), (Goal("flash", "sdpa", 0.8),))
    rows = [row(candidate="sdpa", median_s=0.4), row()]
    written = document(rows=rows, goals=goal_results(group, rows), memory=[memory()], checked=True)
    written.save(tmp_path / "new" / "reach.json")
    assert load(tmp_path / "new" / "reach.json") == written


def test_goals_are_ratios_of_times():
    group = Group(Shape(T=128), "fwd", ("sdpa", "flash"), (Goal("flash", "sdpa", 0.8),))
    (goal,) = goal_results(group, [row(candidate="sdpa", median_s=0.4), row()])
    assert goal.speed == pytest.approx(0.8)
    assert goal.reached
    (missed,) = goal_results(group, [row(candidate="sdpa", median_s=0.3), row()])
    assert not missed.reached
    (unmeasured,) = goal_results(group, [row(candidate="sdpa", median_s=0.3)])
    assert unmeasured.speed is None
    assert not unmeasured.reached


@pytest.mark.parametrize(
    ("measure", "speed"), [("time", 2.0), ("flops", 2.0 * 30 / 10), ("bytes", 2.0 * 7 / 28)]
)
def test_goals_are_ratios_of_time_of_flops_or_of_bytes(measure, speed):
    goal = Goal("flash", "sdpa", 1 / 1.25, 1.0, measure, as_cost=True, label="a line")
    group = Group(Shape(T=128), "fwd", ("sdpa", "flash"), (goal,))
    theirs = row(candidate="sdpa", median_s=1.0, flops=10.0, min_bytes=28)
    (result,) = goal_results(group, [theirs, row(flops=30.0, min_bytes=7)])
    assert result.speed == pytest.approx(speed)
    assert result.reached == (speed >= 0.8)
    assert result.aim_reached == (speed >= 1)
    assert result.shown(result.wanted) == pytest.approx(1.25)
    assert result.label == "a line"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"rows": [dataclasses.asdict(row()) | {"status": "fine"}]},
        {"rows": [dataclasses.asdict(row()) | {"median_s": None}]},
        {"rows": [dataclasses.asdict(row()) | {"median_s": -1.0}]},
        {"rows": [dataclasses.asdict(row(status="error")) | {"median_s": 1.0}]},
        {"rows": [dataclasses.asdict(row()) | {"unknown": 1}]},
        {"rows": [dataclasses.asdict(row()) | {"shape": {"T": 1, "Z": 2}}]},
        {"memory": [dataclasses.asdict(memory()) | {"extra_bytes": [1]}]},
        {"unknown": 1},
        {"rows": None},
    ],
)
def test_malformed_documents_are_refused(change, tmp_path):
    data = dataclasses.asdict(document()) | change
    with pytest.raises((ValueError, TypeError)):
        parse(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"bad\.json: not a benchmark result"):
        load(path)


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "half.json").write_text('{"schema": 1,')
    with pytest.raises(ValueError, match=r"half\.json"):
        load(tmp_path / "half.json")


def test_failures_are_listed_and_refusals_are_not():
    rows = [
        row(),
        row(candidate="fa4", status="unsupported", median_s=None, reason="not installed"),
        row(
            candidate="infini", status="check_failed", median_s=None, reason="out error 1 is over 0"
        ),
        row(candidate="dilated", status="error", median_s=None, reason="boom"),
    ]
    grown = memory(growth=16.0, linear=False)
    lines = document(rows=rows, memory=[memory(), grown]).failed
    assert [line.split()[0] for line in lines] == ["infini", "dilated", "flash"]
    assert "grows 16.0x" in lines[-1]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    for bad in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, bad)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_cannot_be_finished_removes_its_temporary_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_json(tmp_path / "taken", {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_dense_attention_beside_every_rival_that_was_there():
    rates = {"sdpa-cudnn": 0.6, "sdpa-flash": None, "fa4": 0.25, "flash": 0.5}
    rows = [
        row(candidate=name, group=3, median_s=time, flops_per_s=time and 1e12 / time)
        for name, time in rates.items()
    ]
    heads, _, line = rivals_table(document(rows=rows))
    assert "FlashAttention-4" in heads
    assert "FlashAttention-2" not in heads
    assert line.endswith("| 128 | 2 | 2 | **1.20x** | 4 | **0.50x** |")
