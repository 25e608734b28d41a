"""What the documentation shows runs, and what it names exists."""

import json
import re
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


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([\w/.-]+\.(?:md|png|py))\)", page.read_text()):
        assert (page.parent / target).exists(), target


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
