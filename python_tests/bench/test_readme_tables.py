import dataclasses
import importlib.util

import pytest

from bench.hopper_tables import binding
from bench.machine import ROOT
from bench.plot import hopper_curves
from bench.registry import Shape, op_of
from bench.results import RESULTS, Document, MemoryRow, Row, goal_results, load
from bench.ring_tables import ring_goals_table
from bench.suites import TIMED_SUITES

specification = importlib.util.spec_from_file_location(
    "readme_tables", ROOT / "tools/readme_tables.py"
)
readme_tables = importlib.util.module_from_spec(specification)
specification.loader.exec_module(readme_tables)

MACHINE = {
    "kind": "cpu",
    "cpu": "Test CPU",
    "isa": "AVX2",
    "threads": 2,
    "torch": "2.13",
    "commit": "abc",
}
PAGE = "".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->\n" for name in readme_tables.TABLES)


def suite(name):
    document = Document(name, MACHINE, checked=True, date="2026-01-01")
    for group in TIMED_SUITES["cpu"][name]():
        rows = [
            Row(
                c,
                c,
                group.pass_,
                dataclasses.asdict(group.shape),
                "ok",
                median_s=0.25 * i,
                percent_of_peak=50.0,
            )
            for i, c in enumerate(group.candidates, 1)
        ]
        document.rows += rows
        document.goals += goal_results(group, rows)
    return document


def memory():
    shape = dataclasses.asdict(Shape(T=1))
    shape.pop("T")
    row = MemoryRow(
        "flash", "fwd_bwd", shape, [1024, 2048], [1 << 20, 2 << 20], "ok", None, 2.0, True
    )
    return Document("memory", MACHINE, checked=True, date="2026-01-01", memory=[row])


def hopper():
    """The Hopper suite as it would be with speeds of 1.0, without a kernel for landmarks."""
    machine = MACHINE | {"kind": "h200", "gpu": "Test GPU", "cuda": "13"}
    rates = {"peak_flops": {"bf16": 8e14}, "copy_bytes_per_s": 4e12}
    document = Document("hopper", machine, checked=True, date="2026-01-01", **rates)
    for number, group in enumerate(TIMED_SUITES["cuda"]["hopper"](), 1):
        shape = dataclasses.asdict(group.shape)
        rows = [
            Row(name, op_of(name), "fwd", shape, "unsupported", "no kernel")
            if name == "landmark"
            else Row(name, op_of(name), "fwd", shape, "ok", median_s=0.25, flops=1e12,
                     min_bytes=10**12, flops_per_s=4e12, percent_of_peak=50.0)
            for name in group.candidates
        ]  # fmt: skip
        goals = goal_results(group, rows)
        for result in (*rows, *goals):
            result.group = number
        document.rows, document.goals = document.rows + rows, document.goals + goals
    return document


def hopper_scaling():
    document = dataclasses.replace(hopper(), suite="scaling", rows=[], goals=[])
    for group in TIMED_SUITES["cuda"]["scaling"]():
        shape = dataclasses.asdict(group.shape)
        document.rows += [
            Row(name, op_of(name), group.pass_, shape, "ok", median_s=0.25, percent_of_peak=50.0)
            for name in group.candidates
        ]
    return document


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "README.md").write_text(PAGE)
    results = tmp_path / "bench/results/cpu"
    for name in ("reach", "scaling"):
        suite(name).save(results / f"{name}.json")
    memory().save(results / "memory.json")
    return tmp_path


def tool(root, *arguments):
    return readme_tables.main([*arguments, "--root", str(root)])


def test_the_committed_readme_is_current():
    assert readme_tables.main(["--check"]) == 0


def test_tables_and_plot_are_written_then_current(checkout, capsys):
    pytest.importorskip("matplotlib")
    assert tool(checkout, "--check") == 1
    assert "README.md, docs/img/cpu.png: not what bench/results says" in capsys.readouterr().err
    assert tool(checkout) == 0
    assert tool(checkout, "--check") == 0
    text = (checkout / "README.md").read_text()
    assert (
        "| 2048 | 64 | forward | flash | 500.0 | sdpa | 250.0 | **0.50x** | 0.8x (missed) | 50 % |"
        in text
    )
    assert "| flash | forward + backward | 1.0 | 2.0 | 2.0x |" in text
    assert "Test CPU, AVX2, 2 threads, torch 2.13, commit abc; 2026-01-01." in text
    assert "![" in text


def test_every_goal_of_the_hopper_forward_is_one_line(checkout):
    pytest.importorskip("matplotlib")
    results = hopper()
    results.goals[0].speed = 1.2
    (short,) = (goal for goal in results.goals if goal.label == "one token, Hq 8, 1 x 64k keys")
    short.speed = short.wanted - 0.004
    results.save(checkout / "bench/results/h200/hopper.json")
    assert tool(checkout) == 0
    text = (checkout / "README.md").read_text()
    for line in (
        "| flash, D 128, causal, 2k | speed of cuDNN, dense | 2k | 1.05x | **1.20x** | 1 of 1 |",
        "| flash, D 64, full | speed of cuDNN, dense | 4k to 64k | 1.05x | **1.00x** | 0 of 5 |",
        "| landmark, D 64, block 64 | speed of cuDNN, dense | 2k to 32k | 0.88x | - | - |",
        "| dilated, D 64 | time per FLOP of cuDNN inside segments | 32k to 1M | at most 1.25x "
        "| **1.00x** | 6 of 6 |",
        "| one token, Hq 8, 1 x 64k keys | speed per byte of a copy | 64k | 0.89x | **0.886x** "
        "| 0 of 1 |",
        "| one token, Hq 8, 1 x 512k keys | speed per byte of a copy | 512k | 1x | **1.00x** "
        "| 1 of 1 |",
        "| one token, Hq 8, 1 x 512k keys | 1 | 512k | 8 / 8 | 128 | 250.000 | 4.00 TB/s | - "
        "| 250.000 | **1.00x** |",
    ):
        assert line in text
    assert "bf16 matmul 800 TFLOP/s, copy 4.00 TB/s, read and written. Test GPU" in text
    assert text.count("| infini, linear, Hkv 8 | 1 |") == 5


def test_of_two_rivals_the_faster_one_counts():
    goals = [g for g in hopper().goals if g.label == "infini, delta, Hkv 8"]
    assert len(goals) == 10
    goals[0].speed, goals[1].speed, goals[2].speed, goals[3].speed = 0.9, 0.8, None, 0.7
    assert [g.speed for g in binding(goals)] == [0.8, 0.7, 1.0, 1.0, 1.0]


def test_the_plot_of_both_hopper_passes(checkout):
    pytest.importorskip("matplotlib")
    document = hopper_scaling()
    document.save(checkout / "bench/results/h200/scaling.json")
    assert tool(checkout, "--check") == 1
    assert tool(checkout) == 0
    assert tool(checkout, "--check") == 0
    assert "](docs/img/h200.png)" in (checkout / "README.md").read_text()
    assert (checkout / "docs/img/h200.png").exists()
    assert hopper_curves(document, "bwd", lambda row: row.median_s)["infini"][-1][0] == 1 << 19
    curves = hopper_curves(document, "fwd", lambda row: row.median_s)
    assert list(curves) == ["sdpa (cuDNN)", "flash", "landmark", "dilated", "infini",
                            "sdpa (cuDNN), D 64", "dilated, D 64"]  # fmt: skip
    assert curves["infini"][-1] == (1 << 20, 0.25)


def test_the_second_page_is_written_too(checkout):
    pytest.importorskip("matplotlib")
    page = checkout / "docs/hopper_results.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("<!-- bench:hopper-dilated -->\nold\n<!-- /bench:hopper-dilated -->\n")
    tool(checkout)
    assert "Not measured yet" in page.read_text()
    hopper().save(checkout / "bench/results/h200/hopper.json")
    assert tool(checkout, "--check") == 1
    assert tool(checkout) == 0
    assert page.read_text().count("| dilated, D 64 | 1 |") == 6


def test_new_results_are_drift(checkout, capsys):
    pytest.importorskip("matplotlib")
    tool(checkout)
    changed = memory()
    changed.memory[0].extra_bytes = [3 << 20, 6 << 20]
    changed.save(checkout / "bench/results/cpu/memory.json")
    assert tool(checkout, "--check") == 1
    assert tool(checkout) == 0
    assert tool(checkout, "--check") == 0


def test_an_edited_number_is_drift(checkout):
    pytest.importorskip("matplotlib")
    tool(checkout)
    readme = checkout / "README.md"
    readme.write_text(readme.read_text().replace("**0.50x**", "**5.00x**", 1))
    assert tool(checkout, "--check") == 1


def test_without_results_the_tables_say_so(tmp_path):
    (tmp_path / "README.md").write_text(PAGE)
    assert tool(tmp_path) == 0
    assert (tmp_path / "README.md").read_text().count("Not measured yet") == len(
        readme_tables.TABLES
    )
    assert tool(tmp_path, "--check") == 0


@pytest.mark.parametrize("change", [{"checked": False}, {"quick": True}])
def test_unchecked_results_are_refused(checkout, change, capsys):
    dataclasses.replace(suite("reach"), **change).save(checkout / "bench/results/cpu/reach.json")
    assert tool(checkout) == 1
    assert "cannot be published" in capsys.readouterr().err


def test_failed_results_are_refused(checkout, capsys):
    document = suite("reach")
    document.rows[0].status, document.rows[0].median_s = "error", None
    document.save(checkout / "bench/results/cpu/reach.json")
    assert tool(checkout) == 1
    assert "cannot be published" in capsys.readouterr().err


@pytest.mark.parametrize(
    "page", ["<!-- bench:nothing -->\n<!-- /bench:nothing -->\n", "<!-- bench:cpu-reach -->\n"]
)
def test_broken_markers_are_refused(tmp_path, page, capsys):
    (tmp_path / "README.md").write_text(page)
    assert tool(tmp_path) == 1
    assert "markers" in capsys.readouterr().err


def test_a_missing_readme_is_one_line(tmp_path, capsys):
    assert tool(tmp_path, "--check") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_ring_table_says_what_unequal_gpus_could_give():
    document = load(RESULTS / "h200x2" / "ring.json")
    for row in document.rows:
        row.gpus_s = []
    plain = ring_goals_table(document)
    alone = next(row for row in document.rows if row.candidate == "flash")
    alone.gpus_s = [alone.median_s, alone.median_s / 1.1]
    table = ring_goals_table(document)
    assert "the most" not in plain[0] and table[0] == f"{plain[0]} the most |"
    assert table[2] == f"{plain[2]} 2.10x |" and table[3] == f"{plain[3]} - |"
