"""Tuned weights as a difference to weights that may not be given away, and back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECORD = "weight_diff.json"


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"weight_diff: no *.safetensors in {folder}")
    return files


def _tensors(folder: Path) -> dict[str, Any]:
    """Name of every tensor -> its opened file."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in _files(folder):
        opened: Any = safe_open(file, "pt")
        found |= dict.fromkeys(opened.keys(), opened)
    return found


def _change(base: Path, other: Path, out: Path, sign: int) -> str:
    """Write other + sign * base, rows that base does not have as they are; the digest of it.

    Integers of the bits are added, so that the way back is exact in every dtype.
    """
    from safetensors.torch import load_file, save_file

    known = _tensors(base)
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for file in _files(other):
        tensors = load_file(file)
        for name in sorted(tensors):
            if name in known:
                tensors[name] = _shift(tensors[name], known[name].get_tensor(name), sign, name)
            _add(digest, name, tensors[name])
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    for file in other.iterdir():
        if file.suffix == ".json" and file.name != RECORD:
            (out / file.name).write_bytes(file.read_bytes())
    return digest.hexdigest()


def _shift(x: Tensor, base: Tensor, sign: int, name: str) -> Tensor:
    if base.dtype != x.dtype or base.shape[1:] != x.shape[1:] or len(base) > len(x):
        raise ValueError(
            f"weight_diff: {name} is {tuple(x.shape)} {x.dtype}, its base {tuple(base.shape)} "
            f"{base.dtype}; expected one dtype, and no more rows in the base"
        )
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.contiguous().view(integer).clone()
    bits[: len(base)] += sign * base.contiguous().view(integer)  # wraps around
    return bits.view(x.dtype)


def make_diff(base: Path | str, tuned: Path | str, diff: Path | str) -> None:
    """Write the difference of two saved models, which says nothing without the base.

    Tensors that only the tuned model has (gates, rows of new tokens) are written as they are.

    Args:
        base: Folder with safetensors, and so are the others.
        tuned: The model to give away.
        diff: Folder to write, with the digest of the tuned weights beside them.

    Raises:
        ValueError: No safetensors, or tensors that do not fit.
    """
    base, tuned, diff = Path(base), Path(tuned), Path(diff)
    _change(base, tuned, diff, -1)
    (diff / RECORD).write_text(json.dumps({"sha256": _digest(tuned)}) + "\n")


def recover(base: Path | str, diff: Path | str, tuned: Path | str) -> None:
    """Write the tuned model again, bit for bit.

    Args:
        base: The folder that `make_diff` was given, or an equal one.
        diff: What `make_diff` wrote.
        tuned: Folder to write.

    Raises:
        ValueError: Another base: the digest of the result is not the recorded one.
    """
    base, diff, tuned = Path(base), Path(diff), Path(tuned)
    found = _change(base, diff, tuned, 1)
    expected = json.loads((diff / RECORD).read_text())["sha256"]
    if found != expected:
        raise ValueError(
            f"weight_diff: the weights in {tuned} are not the tuned ones (digest {found[:12]}, "
            f"expected {expected[:12]}); expected the base that the difference was made with"
        )


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(name.encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _digest(folder: Path) -> str:
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for file in _files(folder):
        tensors = load_file(file)
        for name in sorted(tensors):
            _add(digest, name, tensors[name])
    return digest.hexdigest()
