"""What `import lctx_kernels` needs, what it costs, and what works without the compiled library."""

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from api.op_calls import qkv

import lctx_kernels as lk
from lctx_kernels import _backend, _load

ROOT = Path(lk.__file__).parent.parent
OPTIONAL = (
    "transformers",
    "accelerate",
    "numpy",
    "typer",
    "tqdm",
    "matplotlib",
    "triton",
    "datasets",
    "tokenizers",
    "safetensors",
    "peft",
    "yaml",
    "tensorboard",
)


def run(code, **env):
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | env, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_needs_torch_alone():
    run(
        "import sys\n"
        f"for name in {OPTIONAL}: sys.modules[name] = None\n"
        "import torch, lctx_kernels\n"
        "q = torch.ones(1, 4, 2, 8, requires_grad=True)\n"
        "lctx_kernels.flash_attention(q, q, q).sum().backward()\n"
        "import lctx_kernels.info; lctx_kernels.info.render(lctx_kernels.info.collect())\n"
    )


def test_imports_no_optional_package():
    out, _ = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import lctx_kernels; new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        f"print(sorted(new & set({OPTIONAL})))"
    )
    assert out.strip() == "[]"


def test_import_is_quick():
    out, _ = run(
        "import time, torch; start = time.perf_counter()\n"
        "import lctx_kernels; print(time.perf_counter() - start)"
    )
    assert float(out) < 1.0


def test_version_is_that_of_the_project():
    assert lk.__version__ == importlib.import_module("lctx_kernels._version").__version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "lctx_kernels._version.__version__" }' in project


def test_public_names():
    assert all(hasattr(lk, name) for name in lk.__all__)
    assert callable(lk.supports) and callable(lk.checkpoint_policy)
    assert (ROOT / "lctx_kernels" / "py.typed").is_file()


def test_without_the_library_the_reference_works():
    out, _ = run(
        "import pathlib; real = pathlib.Path.is_file\n"
        "pathlib.Path.is_file = lambda self: self.name != '_C.abi3.so' and real(self)\n"
        "import torch, lctx_kernels as lk\n"
        "q = torch.ones(1, 4, 2, 8, requires_grad=True)\n"
        "lk.flash_attention(q, q, q, backend='reference').sum().backward()\n"
        "lk.blockwise_cross_entropy(q[0, :, 0], q[0, :, 1], torch.arange(4), chunk_size=2)\n"
        "print(lk.supports('flash_attention', q, q, q))\n"
        "try: lk.flash_attention(q, q, q)\n"
        "except NotImplementedError as error: print(error)\n"
    )
    assert out.count("the compiled kernels are missing (_C.abi3.so is not in ") == 2
    assert out.count('nearest is backend="reference"') == 2


def test_a_library_of_another_platform_is_reported(tmp_path):
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"\x7fELF of something else")
    message = _load.load(library)
    assert message.startswith(f"{library} cannot be loaded by torch {torch.__version__}: ")
    assert "expected torch >= 2.11 and the platform that it was built on" in message


def test_log_names_op_shapes_dtypes_backend():
    _, err = run(
        "import torch, lctx_kernels as lk; q = torch.ones(1, 4, 2, 8)\n"
        "lk.flash_attention(q, q, q, window=3)\n"
        "lk.flash_attention(q, q, q, backend='reference')\n",
        LCTX_LOG="1",
    )
    first, second = err.strip().splitlines()
    assert first.startswith("flash_attention on cpu: q=float32 (1, 4, 2, 8) cpu, k=float32 ")
    assert "window=3" in first
    assert second.startswith("flash_attention on reference: ")


def test_no_log_unless_asked_for(caplog):
    if _backend.LOG:
        pytest.skip("LCTX_LOG is set")
    with caplog.at_level(logging.DEBUG, logger="lctx_kernels"):
        lk.flash_attention(*qkv())
    assert not caplog.records
