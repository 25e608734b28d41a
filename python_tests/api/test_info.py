"""`python -m lctx_kernels.info`: complete, machine readable, and alive when something is broken."""

import json
import subprocess
import sys

import pytest

import lctx_kernels
from lctx_kernels import info

OPS = (
    "flash_attention", "infini_attention", "landmark_attention", "dilated_attention",
    "merge_attention", "ring_attention",
)  # fmt: skip


def run_module(*arguments):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "lctx_kernels.info"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout


def test_json_has_everything():
    facts = json.loads(run_module("--json"))
    assert facts["version"] == lctx_kernels.__version__
    assert facts["torch"]["version"] and facts["cpu"]["model"] and facts["python"]
    assert facts["library"]["loaded"] and facts["library"]["cpu"]["active_isa"]
    assert set(facts["library"]["cuda"]) >= {"built", "skipped"}
    assert tuple(facts["ops"]) == (*OPS, "cp.decode_attention")
    assert facts["ops"]["cp.decode_attention"]["cpu"] == "forward only"
    for op in OPS:
        assert facts["ops"][op]["reference"] == facts["ops"][op]["cpu"] == "yes"


@pytest.mark.parametrize(
    ("gpus", "want"),
    [
        ([], "built, no GPU here"),
        ([{"capability": "8.0"}], "built, no Hopper GPU here"),
        ([{"capability": "8.0"}, {"capability": "9.0"}], "yes"),
    ],
)
def test_ops_that_no_gpu_here_runs_are_not_promised(gpus, want, monkeypatch):
    monkeypatch.setattr(info, "_gpus", lambda: gpus)
    facts = info.collect()
    built = facts["library"]["cuda"]["built"]
    assert {facts["ops"][op]["cuda"] for op in OPS} == {want if built else "no kernel"}
    assert {facts["ops"][op]["cpu"] for op in OPS} == {"yes"}


def test_text_names_every_op_and_what_is_not_built():
    text = run_module()
    assert all(op in text for op in OPS)
    facts = info.collect()
    if not facts["library"]["cuda"]["built"]:
        assert f"cuda: not built: {facts['library']['cuda']['skipped']}" in text
    assert f"this machine runs {facts['library']['cpu']['active_isa']}" in text


@pytest.mark.parametrize("probe", ["_cpu", "_torch", "_gpus", "_installed", "_library", "_ops"])
def test_a_probe_that_fails_does_not_hide_the_others(monkeypatch, probe):
    def fail():
        raise OSError("no such thing")

    monkeypatch.setattr(info, probe, fail)
    facts = info.collect()
    broken = [name for name, fact in facts.items() if "OSError: no such thing" in str(fact)]
    assert len(broken) == 1
    assert "unknown (OSError: no such thing)" in info.render(facts)
    json.dumps(facts)


def test_a_missing_library_is_described(monkeypatch):
    from lctx_kernels import _load

    monkeypatch.setattr(_load, "LIBRARY_ERROR", "the compiled kernels are missing; run pip")
    text = info.render(info.collect())
    assert "kernels: not loaded: the compiled kernels are missing; run pip" in text
    assert "no: the library is not loaded" in text


def test_main_prints(capsys):
    assert info.main([]) == 0
    assert capsys.readouterr().out.startswith("lctx_kernels ")
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == lctx_kernels.__version__
