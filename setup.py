"""Builds ``lctx_kernels/_C.abi3.so`` and ``_ring`` with CMake. The rest is in pyproject.toml.

Environment: ``LCTX_CUDA=auto|on|off``, ``TORCH_CUDA_ARCH_LIST``, ``CUDA_HOME``, ``CXX``,
``MAX_JOBS``, ``CMAKE_ARGS``.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build"
GIB = 2**30


def fail(what: str, hint: str) -> NoReturn:
    """End the build with two lines instead of a traceback."""
    sys.exit(f"lctx_kernels cannot be built: {what}\n{hint}")


def find_program(names: list[str], hint: str) -> str:
    """Return the first program that is installed, in this environment or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in names:
        program = shutil.which(name, path=path)
        if program:
            return program
    fail(f"{' or '.join(names)} was not found", hint)


def memory_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def num_jobs() -> int:
    """Compile jobs: one a core, 4 GiB of memory for each, at most MAX_JOBS."""
    jobs = min(len(os.sched_getaffinity(0)), memory_bytes() // (4 * GIB))
    limit = os.environ.get("MAX_JOBS", "")
    return max(min(jobs, int(limit)) if limit.isdigit() else jobs, 1)


def run_cmake_configure(command: list[str]) -> None:
    """Run CMake and show the lines it has for the user; where it fails, two of them."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    messages = result.stderr.splitlines()
    if result.returncode:
        errors = [line.partition("lctx-error: ")[2] for line in messages if "lctx-error: " in line]
        if len(errors) >= 2:
            fail(errors[0], errors[1])
        sys.stderr.write(result.stdout + result.stderr)
        fail("CMake failed", "What it says is above; remove the folder build/ to start afresh.")
    print(*(line for line in messages if line.startswith("lctx_kernels")), sep="\n", flush=True)


def forget_other_tree() -> None:
    """Remove a build folder that was copied here with the sources: CMake would refuse it."""
    cache = BUILD_DIR / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(BUILD_DIR)


class CMakeBuild(build_ext):
    """Runs CMake in ``build/``, where a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, compile, and put the library where setuptools wants it."""
        cmake = find_program(["cmake"], "run: pip install cmake ninja")
        ninja = find_program(["ninja"], "run: pip install cmake ninja")
        compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
        compiler = find_program(compilers, "install a C++20 compiler, g++ >= 11 or clang++ >= 14")
        options = {
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_CXX_COMPILER": compiler,
            "CMAKE_MAKE_PROGRAM": ninja,
        }
        forget_other_tree()
        command = [cmake, "-S", str(ROOT), "-B", str(BUILD_DIR), "-G", "Ninja"]
        command += [f"-D{name}={value}" for name, value in options.items()]
        run_cmake_configure(command + shlex.split(os.environ.get("CMAKE_ARGS", "")))

        compile_all = [cmake, "--build", str(BUILD_DIR), "--parallel", str(num_jobs())]
        if subprocess.run(compile_all, check=False).returncode:
            fail("a file did not compile", "The compiler's messages are above (pip install -v).")

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        ring = f"_ring{sysconfig.get_config_var('EXT_SUFFIX')}"  # where it was not skipped
        for library in filter(Path.is_file, (BUILD_DIR / target.name, BUILD_DIR / ring)):
            partial = target.with_name(f"{library.name}.partial")
            shutil.copy2(library, partial)
            # A process that has the old library loaded keeps it.
            partial.replace(target.with_name(library.name))


setup(
    license="Apache-2.0",
    ext_modules=[Extension("lctx_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
