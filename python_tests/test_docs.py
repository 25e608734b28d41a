"""What the documentation shows runs, and what it names exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_examples_of_models_run(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    exec("\n".join(blocks), {})


@pytest.mark.parametrize("page", ["infini", "landmark", "dilated"])
def test_examples_of_methods_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})


def test_the_first_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(block, {})


def test_the_example_of_a_ring_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/ring.md").read_text(), re.DOTALL)
    before = (
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "seq_len, world_size, rank, mesh = 50, 1, 0, {'cp': dist.group.WORLD}\n"
        "tokens, (q, k, v) = torch.arange(50)[None], torch.randn(3, 1, 50, 4, 8)\n"
    )
    after = "assert labels.tolist() == [[*range(1, 50), -100]] and out.shape == q.shape\n"
    after += "dist.destroy_process_group()"
    run = subprocess.run([sys.executable, "-c", before + block + after], cwd=ROOT,
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr


PAGES = [*sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("*.md"), ROOT / "csrc/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([\w/.-]+\.(?:md|png|py))(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page):
    folders = "lctx_kernels|csrc|python_tests|bench|docs|examples|tools"
    for target in re.findall(rf"`((?:{folders})/[\w/.-]*\w)`", page.read_text()):
        assert (ROOT / target).exists() or (ROOT / "python_tests" / target).exists(), target


def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples/models.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    exec("\n".join(code), {})


def test_every_test_that_the_documentation_names_exists():
    text = (ROOT / "docs/from_the_originals.md").read_text()
    named = re.findall(r"`(\w+/test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 40
    for file, name in named:
        path = ROOT / "python_tests" / file
        assert path.is_file(), file
        assert name == "" or f"def {name}(" in path.read_text(), f"{file}::{name}"


def test_every_command_that_the_documentation_names_exists():
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from lctx_kernels import cli

    text = (ROOT / "docs/models.md").read_text() + (ROOT / "docs/from_the_originals.md").read_text()
    commands = set(re.findall(r"lctx ((?:eval )?[a-z]+)", text)) - {"info"}
    assert {"train", "generate", "eval passkey", "convert"} <= commands
    for command in commands:
        result = CliRunner().invoke(cli.build_app(), [*command.split(), "--help"])
        assert result.exit_code == 0, command
