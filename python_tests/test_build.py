"""The build: what it says when it cannot, what it leaves out and why, and what comes out of it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import lctx_kernels  # noqa: F401  loads the library

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "lctx_kernels" / "_C.abi3.so"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CMAKE, NINJA = shutil.which("cmake", path=TOOLS), shutil.which("ninja", path=TOOLS)

needs_tools = pytest.mark.skipif(not (CMAKE and NINJA), reason="needs cmake and ninja")
needs_library = pytest.mark.skipif(not LIBRARY.is_file(), reason="not built in place")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, as a clone would have them."""
    copy = tmp_path_factory.mktemp("clone") / "lctx_kernels"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def run(command, cwd, **environment):
    """Run a command; a variable set to None is removed from its environment."""
    variables = {"PATH": TOOLS, "LCTX_CUDA": None, "TORCH_CUDA_ARCH_LIST": None, **environment}
    env = {**os.environ, **{k: v for k, v in variables.items() if v is not None}}
    for name in [name for name, value in variables.items() if value is None]:
        env.pop(name, None)
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        capture_output=True,
        check=False,
    )


def refuse(tree, tmp_path, **environment):
    """The two lines of a build that must fail."""
    result = run([sys.executable, "setup.py", "-q", "build_ext"], tree, **environment)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("lctx_kernels cannot be built: ")
    return lines


def configure(tree, build_dir, *options, **environment):
    """CMake's messages for a build that is configured but not compiled."""
    command = [CMAKE, "-S", tree, "-B", build_dir, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
    return run([*command, f"-DPython_EXECUTABLE={sys.executable}", *options], tree, **environment)


def without_nvcc():
    """CMake options under which no nvcc of this machine is found."""
    folders = {"/usr/local/cuda/bin"}
    folders |= {folder for folder in TOOLS.split(os.pathsep) if Path(folder, "nvcc").exists()}
    folders |= {str(Path(folder).resolve()) for folder in folders}
    for name in ("CUDA_HOME", "CUDA_PATH"):
        folders.add(os.path.join(os.environ.get(name, "/nonexistent"), "bin"))
    return "-DCMAKE_IGNORE_PATH=" + ";".join(sorted(folders))


@needs_tools
@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"CXX": "no-such-compiler"}, "no-such-compiler was not found"),
        ({"LCTX_CUDA": "maybe"}, "LCTX_CUDA=maybe is not understood"),
        ({"TORCH_CUDA_ARCH_LIST": "9.0a;banana"}, "'banana' is not an architecture"),
        (
            {"TORCH_CUDA_ARCH_LIST": "8.0 8.6+PTX", "LCTX_CUDA": "on"},
            "LCTX_CUDA=on, but TORCH_CUDA_ARCH_LIST=8.0 8.6+PTX names no Hopper GPU",
        ),
        ({"CMAKE_ARGS": without_nvcc(), "LCTX_CUDA": "on"}, "LCTX_CUDA=on, but nvcc was not found"),
    ],
)
def test_refusals_have_two_lines(tree, tmp_path, environment, what):
    assert what in refuse(tree, tmp_path, **environment)[0]


@needs_tools
def test_old_torch_is_refused(tree, tmp_path):
    old = tmp_path / "torch"
    old.mkdir()
    (old / "__init__.py").write_text("raise SystemExit('torch must not be imported')")
    (old / "version.py").write_text("__version__ = '2.4.1+cu121'\n")
    lines = refuse(tree, tmp_path, PYTHONPATH=str(tmp_path))
    assert "torch 2.4.1+cu121" in lines[0]
    assert "is too old" in lines[0]
    assert lines[1] == "run: pip install 'torch>=2.11'"


@needs_tools
def test_missing_torch_is_refused(tree, tmp_path):
    venv.create(tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    result = configure(tree, tmp_path / "b", f"-DPython_EXECUTABLE={python}", HOME=str(tmp_path))
    errors = [line for line in result.stderr.splitlines() if line.startswith("lctx-error: ")]
    assert errors[0] == f"lctx-error: no torch in the environment of {python}"
    assert "install torch>=2.11 first" in errors[1]


def test_torch_is_found_without_importing_it():
    script = ROOT / "third_party" / "find_torch.py"
    code = f"import runpy, sys; runpy.run_path({str(script)!r}, run_name='__main__'); "
    code += "assert 'torch' not in sys.modules"
    result = run([sys.executable, "-c", code], ROOT)
    assert result.stdout.strip() == f"{Path(torch.__file__).parent};{torch.__version__}"


@needs_tools
@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        ([], {"LCTX_CUDA": "off"}, "LCTX_CUDA=off"),
        ([without_nvcc()], {}, "nvcc was not found"),
        ([], {"TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST=7.5 names no Hopper GPU"),
    ],
)
def test_skipped_cuda_is_said_in_one_line(tree, tmp_path, options, environment, reason):
    result = configure(tree, tmp_path, *options, **environment)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "CUDA" in line]
    assert lines == [f"lctx_kernels: CUDA kernels are skipped: {reason}"]


@pytest.mark.parametrize(
    ("limit", "memory_gib", "jobs"),
    [("", 64, 4), ("2", 64, 2), ("99", 64, 4), ("", 9, 2), ("", 1, 1)],
)
def test_number_of_jobs(monkeypatch, limit, memory_gib, jobs):
    pytest.importorskip("setuptools")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setenv("MAX_JOBS", limit)
    build = runpy.run_path(str(ROOT / "setup.py"))
    num_jobs = build["num_jobs"]
    monkeypatch.setitem(num_jobs.__globals__, "memory_bytes", lambda: memory_gib * 2**30)
    assert num_jobs() == jobs


def symbols(*options, path=LIBRARY):
    listing = subprocess.run(
        ["nm", *options, str(path)], capture_output=True, text=True, check=True
    )
    return [line.split()[-2:] for line in listing.stdout.splitlines() if line.strip()]


@needs_library
def test_library_depends_on_stable_interfaces_only():
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"Shared library: \[([^\]]+)\]", dynamic.stdout))
    allowed = {"libtorch.so", "libtorch_cpu.so", "libc10.so", "libstdc++.so.6", "libgcc_s.so.1"}
    allowed |= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed <= allowed
    assert "RPATH" not in dynamic.stdout
    assert "RUNPATH" not in dynamic.stdout

    undefined = symbols("-D", "--undefined-only")
    names = {name.partition("@")[0] for _, name in undefined}
    foreign = re.compile(r"_Z\w*(2at|3c10|5torch|N5caffe)")  # the C++ of torch, c10 or ATen
    assert not [name for name in names if foreign.match(name)]
    assert {name for name in names if name.startswith(("Py", "_Py"))} <= {"PyModule_Create2"}
    assert not [name for name in names if name.startswith(("cuda", "cu", "nccl"))]
    stream = [kind for kind, name in undefined if name == "aoti_torch_get_current_cuda_stream"]
    assert stream in ([], ["w"])  # weak: a CPU build of torch has no such symbol


@needs_library
def test_library_shows_only_its_module():
    assert [name for _, name in symbols("-D", "--defined-only")] <= ["PyInit__C"]


def test_instruction_sets_do_not_leak():
    """No code compiled for AVX may stand where the linker could choose it for other processors."""
    for isa in ("avx2", "avx512"):
        path = ROOT / "build" / f"CMakeFiles/lctx_cpu_{isa}.dir/csrc/cpu/kernels_isa.cpp.o"
        if not path.is_file():
            pytest.skip("not built here")
        shared = [name for kind, name in symbols("--defined-only", path=path) if kind in "VWu"]
        assert not [name for name in shared if isa not in name]


def test_build_info_describes_the_build():
    info = json.loads(torch.ops.lctx.build_info())
    version = re.search(
        r'"(.+)"', (ROOT / "lctx_kernels" / "_version.py").read_text().split("=")[1]
    )
    assert info["version"] == version[1]
    assert "base" in info["cpu"]["isa"]
    assert info["cpu"]["active_isa"] in info["cpu"]["isa"]
    assert info["cuda"]["built"] == (info["cuda"]["skipped"] == "")
    assert info["cuda"]["archs"] == (["9.0a"] if info["cuda"]["built"] else [])


def with_headers(source):
    """A kernel file and the main loops that it instantiates."""
    found = [source]
    for path in found:
        headers = re.findall(r'#include "(\w+\.cuh)"', path.read_text())
        found += [path.parent / name for name in headers if path.parent / name not in found]
    return found


def test_cuda_kernels_compiled_well():
    """Every kernel of csrc/cuda is in build/ptxas.json, without spills or serialised wgmma."""
    table_file = ROOT / "build" / "ptxas.json"
    if not table_file.is_file():
        pytest.skip("CUDA kernels were not built here")
    table = json.loads(table_file.read_text())
    for row in table:
        assert row["spills"] == 0, row
        assert row["warnings"] == [], row
        assert row["arch"] == "sm_90a", row
    all_written, all_built = set(), set()
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        own, written = (
            set(re.findall(r"\b(\w+_kernel)\(", "".join(path.read_text() for path in paths)))
            for paths in ([source], with_headers(source))
        )
        built = {re.sub(r"<.*|.*::", "", row["kernel"].partition("<")[0]) for row in table
                 if row["source"] == source.name}  # fmt: skip
        assert own <= built <= written, source.name  # not every file has all of a header's
        all_written |= written
        all_built |= built
    assert all_written == all_built
    merges = {row["kernel"].rpartition("::")[2] for row in table if "merge" in row["kernel"]}
    for element, pack in (("float", 4), ("double", 2), ("__half", 8), ("__nv_bfloat16", 8)):
        for kernel in ("merge_fwd_kernel", "merge_bwd_kernel"):
            assert {f"{kernel}<{element}, {n}>" for n in (1, pack)} <= merges


def test_ptxas_table_sees_spills_and_serialised_wgmma():
    parser = runpy.run_path(str(ROOT / "tools" / "ptxas_table.py"))
    log = """
ptxas info    : (C7510) Potential Performance Loss: wgmma is serialized in function 'slow'
ptxas info    : Compiling entry function 'slow' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'spilling' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers
"""
    rows = parser["parse"](log)
    numbers = {row["symbol"]: (row["registers"], row["smem"], row["spills"]) for row in rows}
    assert numbers == {"slow": (168, 1024, 0), "spilling": (255, 0, 12)}
    found = parser["complaints"](rows)
    assert len(found) == 2
    assert "C7510" in found[0]
    assert found[1] == "spilling: 12 bytes of register spills"


SMOKE = """
import torch, lctx_kernels
q, k, v = torch.randn(3, 1, 70, 2, 16).unbind()
for backend in ("cpu", "reference"):
    out = lctx_kernels.flash_attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, lctx_kernels.flash_attention(q, k, v))
print(lctx_kernels.__file__)
"""


def make_environment(folder):
    """A new environment that sees this one's packages, but not this one's lctx_kernels."""
    venv.create(folder)
    python = folder / "bin" / "python"
    target = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
    Path(target.stdout.strip(), "outer.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


def pip(python, *arguments, cwd):
    command = [sys.executable, "-m", "pip", "--no-input", "--python", python, *arguments]
    result = run(command, cwd)
    if "No matching distribution found for setuptools" in result.stderr:
        pytest.skip("no package index: build isolation cannot be tried")
    assert result.returncode == 0, result.stdout + result.stderr


def smoke(python, folder):
    result = run([python, "-c", SMOKE], folder)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


@needs_tools
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheels_of_every_kind(tree, tmp_path):
    """With isolation (the only full compilation), without, editable: one library for all."""
    pytest.importorskip("setuptools")
    pip(sys.executable, "wheel", "--no-deps", "-w", tmp_path, tree, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"lctx_kernels-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["lctx_kernels/_C.abi3.so"]
    assert "lctx_kernels/py.typed" in names
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]

    installed = make_environment(tmp_path / "installed")
    pip(installed, "install", "-I", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert tmp_path in smoke(installed, tmp_path).parents

    plain = tmp_path / "plain"
    pip(
        sys.executable,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        plain,
        tree,
        cwd=tmp_path,
    )
    assert [path.name for path in plain.glob("*.whl")] == [wheel.name]

    editable = make_environment(tmp_path / "editable")
    pip(editable, "install", "-I", "--no-deps", "--no-build-isolation", "-e", tree, cwd=tmp_path)
    assert smoke(editable, tmp_path) == tree / "lctx_kernels" / "__init__.py"


@pytest.mark.slow
def test_sdist_has_what_a_build_needs(tree, tmp_path):
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path]
    result = run(command, tree)
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    for folder in ("csrc", "third_party", "tools", "lctx_kernels"):
        wanted = {str(p.relative_to(tree)) for p in (tree / folder).rglob("*") if p.is_file()}
        wanted = {name for name in wanted if not name.endswith((".so", ".pyc"))}
        assert wanted <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith("build/")]
