import dataclasses
import importlib.util

import pytest

from bench.machine import ROOT
from bench.registry import Shape
from bench.results import Document, MemoryRow, Row, goal_results
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
