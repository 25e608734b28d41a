"""The layout stays what csrc/README.md and the style say it is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))
FOLDERS = ("lctx_kernels", "python_tests", "bench", "tools", "third_party")
PYTHON = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
PYTHON.append(ROOT / "setup.py")


def relative(path):
    return str(path.relative_to(ROOT))


def lines(path):
    return path.read_text().splitlines()


def table():
    """Rows of the map: a dict from column to the names in backticks."""
    rows = [line.strip("| ").split("|") for line in lines(CSRC / "README.md")[2:]]
    rows = rows[: next(i for i, row in enumerate(rows) if len(row) == 1)]
    head = [cell.strip() for cell in rows[0]]
    names = [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows[2:]]
    return [dict(zip(head, row, strict=True)) for row in names]


def test_map_has_every_op_once():
    schemas = (CSRC / "api" / "register.cpp").read_text()
    ops = re.findall(r'm\.def\(\s*"(\w+)\(', schemas)
    assert len(ops) > 5
    assert sorted(op for row in table() for op in row["ops"]) == sorted(ops)


@pytest.mark.parametrize("row", table(), ids=lambda row: row["ops"][0])
def test_map_is_true(row):
    for column in ("tensors to kernels", "CPU", "CUDA"):
        for name in row[column]:
            text = (ROOT / name).read_text()
            assert not [op for op in row["ops"] if op not in text], name
    for column in ("definition", "Python", "test"):
        for name in row[column]:
            assert (ROOT / name).is_file(), name
    registry = (ROOT / "bench" / "registry.py").read_text()
    assert not [name for name in row["bench"] if f'"{name}"' not in registry]
    glue = "".join((ROOT / name).read_text() for name in row["tensors to kernels"])
    assert bool(row["CUDA"]) == ("STABLE_TORCH_LIBRARY_IMPL(lctx, CUDA" in glue)


def test_map_has_every_kernel_file():
    mapped = {name for row in table() for names in row.values() for name in names}
    files = {relative(path) for path in (CSRC / "cuda").glob("*.cu")}
    files |= {relative(path) for path in (ROOT / "lctx_kernels" / "reference").glob("*.py")}
    files -= {"lctx_kernels/reference/__init__.py", "lctx_kernels/reference/ring.py"}
    assert files <= mapped


def line_limit(path):
    name = relative(path)
    if name in ("setup.py", "CMakeLists.txt"):
        return 150
    if name.startswith("lctx_kernels/reference/"):
        return 60
    if name.startswith("csrc/common/"):
        return 250
    if name.startswith("csrc/api/") and path.stem not in ("checks", "register"):
        return 150
    return 400 if path.suffix == ".py" else 500


@pytest.mark.parametrize("path", [*SOURCES, *PYTHON, ROOT / "CMakeLists.txt"], ids=relative)
def test_file_length(path):
    assert len(lines(path)) <= line_limit(path)


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_function_length(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            first = node.body[0].end_lineno if documented else node.lineno
            length = node.end_lineno - first + 1
            assert length <= 80, f"{node.name} has {length} lines besides its docstring"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_includes(path):
    """Only csrc/api knows torch, and only its stable headers; csrc/cpu does not know CUDA."""
    includes = re.findall(r'^\s*#include\s+[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    of_torch = [name for name in includes if re.match(r"(torch|ATen|c10|aten)/", name)]
    stable = ("torch/csrc/stable/", "torch/headeronly/")
    if path.parent.name == "api":
        assert not [name for name in of_torch if not name.startswith(stable)]
    else:
        assert not of_torch
    if path.parent.name in ("cpu", "csrc"):
        assert not [name for name in includes if name.startswith("cuda")]


def test_package_imports_torch_alone():
    """No import outside the standard library and torch at the top of a module of the core."""
    optional = {"cli.py": {"typer"}, "demo_plot.py": {"matplotlib"}}
    for path in (ROOT / "lctx_kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names}:
                heavy = {"transformers", "numpy", "matplotlib", "typer", "tqdm", "triton"}
                assert name not in heavy - optional.get(path.name, set()), f"{path.name}: {name}"


@pytest.mark.parametrize("path", sorted((CSRC / "cuda").glob("*.cu")), ids=relative)
def test_kernel_files_begin_with_their_description(path):
    comment = []
    for line in lines(path):
        if not line.startswith("//"):
            break
        comment.append(line)
    assert 5 <= len(comment) <= 30
    headings = [m[1] for line in comment if (m := re.match(r"// ([A-Z][a-z]+(?: map)?):", line))]
    assert headings == ["Math", "Tile map", "Pipeline", "Memory", "Limits"]


@pytest.mark.parametrize("path", [*SOURCES, *PYTHON], ids=relative)
def test_no_leftovers(path):
    if path == Path(__file__):
        return
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    assert text == "" or text.endswith("\n")
