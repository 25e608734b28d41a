"""Loads the compiled kernels (`_C.abi3.so`); without them only the reference backend works."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")


def load(library: Path) -> str | None:
    """Load the library and register its ops; None, or the reason why they cannot be used."""
    if not library.is_file():
        return (
            f"the compiled kernels are missing ({library.name} is not in {library.parent}); run "
            "`pip install .` in the source tree"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f"{library} cannot be loaded by torch {torch.__version__}: {error}; expected torch >= "
            "2.11 and the platform that it was built on; run `pip install .` again"
        )
    return None


LIBRARY_ERROR = load(LIBRARY)
