import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bench import run
from bench.hopper import hopper
from bench.machine import ROOT, describe_machine, machine_kind, machine_line, measure_peak
from bench.registry import quick
from bench.results import Document, GoalResult, Row, load
from bench.suites import cpu_scaling
from bench.timing import QUICK


def bench(*arguments):
    return CliRunner().invoke(run.app, list(arguments))


def test_list_shows_the_suites():
    result = bench("--list", "--device", "cpu")
    assert result.exit_code == 0
    assert "b1-t16384-h8-d64-fp32 fwd_bwd: sdpa, flash, infini, dilated, landmark" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "flush"], "'flush' is not known"),
        (["--op", "flash", "--against", "flosh"], "'flosh' is not known"),
        (["--op", "flash", "--shapes", "8z"], "cannot read '8z'"),
        (["--suite", "nothing", "--device", "cpu"], "suites of cpu"),
        (["--device", "tpu"], "expected cpu, cuda or auto"),
        (["--save", "--quick"], "needs a whole, checked suite"),
        (["--save", "--no-check"], "needs a whole, checked suite"),
        (["--save", "--op", "flash"], "needs a whole, checked suite"),
        (["--save", "--only", "flash"], "needs a whole, checked suite"),
        (["--only", "nothing", "--device", "cpu"], "no such candidate or goal"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_passes_and_competitors_of_an_operation():
    groups = run.ad_hoc_groups("dilated,merge_fwd", "1k,2k", "sdpa,torch-merge,flash", "cpu")
    assert [(g.shape.T, g.pass_, g.candidates) for g in groups] == [
        (1024, "fwd", ("sdpa", "flash", "dilated")),
        (1024, "fwd_bwd", ("sdpa", "flash", "dilated")),
        (2048, "fwd", ("sdpa", "flash", "dilated")),
        (2048, "fwd_bwd", ("sdpa", "flash", "dilated")),
        (1024, "fwd", ("torch-merge", "merge")),
        (2048, "fwd", ("torch-merge", "merge")),
    ]


def test_only_some_groups_of_a_suite():
    plan = {"hopper": hopper()}
    for only, count in (
        ("landmark", 20),
        ("flash, D 64", 10),
        ("copy", 6),
        ("infini, delta", 10),
        ("carry", 1),
    ):
        assert len(run._selected(plan, [only])["hopper"]) == count


@pytest.mark.parametrize(
    ("speed", "text"),
    [
        (0.9, "infini: 1.111x the time of sdpa (at most 1.15, aim 1): reached"),
        (1.1, "infini: 0.909x the time of sdpa (at most 1.15, aim 1): aim reached"),
        (0.5, "infini: 2.000x the time of sdpa (at most 1.15, aim 1): NOT reached"),
        (None, "infini: time of sdpa not measured (at most 1.15, aim 1)"),
    ],
)
def test_a_goal_is_one_line(speed, text):
    goal = GoalResult("infini", "sdpa", "fwd", {"T": 8}, 1 / 1.15, speed, 1.0, as_cost=True)
    assert run.goal_line(goal) == text


@pytest.mark.slow
def test_one_operation_from_the_command_line(tmp_path):
    path = tmp_path / "flash.json"
    arguments = [
        "--op",
        "flash_fwd",
        "--shapes",
        "200-d16",
        "--backend",
        "reference",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "bench.run", *arguments, "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = load(path)
    assert [row.candidate for row in document.rows] == ["sdpa", "flash"]
    assert document.checked
    assert document.quick
    assert document.peak_flops["fp32"] > 0
    assert "% of matmul" in done.stdout


def test_what_was_measured_before_an_interruption_is_kept(tmp_path):
    path, groups = tmp_path / "cut.json", [quick(group) for group in cpu_scaling()[:2]]
    document = Document("scaling", {"kind": "cpu"}, checked=True)

    class Interrupted(run.IsolatedRunner):
        def run(self, group):
            if document.rows:
                raise KeyboardInterrupt
            return super().run(group)

    with Interrupted("cpu", "auto", True, QUICK) as runner, pytest.raises(KeyboardInterrupt):
        run.run_suite("scaling", runner, groups, document, lambda: run._keep([document], path))
    assert {row.group for row in load(path).rows} == {1}


def test_failed_documents_are_not_saved_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "default_path", lambda kind, suite: tmp_path / kind / f"{suite}.json")
    shape = {"T": 8}
    bad = Row("flash", "flash", "fwd", shape, "check_failed", "out error 1.0e-01 is over 1.0e-06")
    good = Document("scaling", {"kind": "cpu"}, checked=True)
    failed = Document("reach", {"kind": "cpu"}, checked=True, rows=[bad])
    assert run._report([good, failed], tmp_path / "all.json", save=True) == 1
    assert "FAILED flash fwd" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "cpu").iterdir()] == ["scaling.json"]
    assert json.loads((tmp_path / "all.json").read_text())["suite"] == "scaling+reach"
    assert run._report([good], None, save=True) == 0


def test_the_machine_line_names_what_a_number_depends_on():
    facts = describe_machine("cpu")
    json.dumps(facts)
    line = machine_line(facts)
    assert machine_kind("cpu") == facts["kind"] == "cpu"
    assert f"{facts['threads']} threads" in line
    assert facts["torch"] in line


def test_the_matmul_peak_is_plausible():
    import torch

    assert 1e8 < measure_peak("cpu", torch.float32, QUICK) < 1e14
