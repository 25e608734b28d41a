"""Plots of committed results; a PNG carries the hash of its sources, so that drift shows."""

import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lctx_kernels.demo_plot import COLOURS, Curve, Panel, plot_panels

from .machine import machine_line
from .registry import BASELINES
from .results import Document, Row, load
from .ring_tables import RIVAL

SOURCE_KEY = "Source-SHA256"


def plot_cpu(sources: Sequence[Path], path: Path) -> None:
    """Time of forward + backward, and peak extra memory, by length, from the CPU's suites."""
    documents = {document.suite: document for document in map(load, sources)}
    timed = [documents[name] for name in ("scaling", "reach")]
    panels = [
        Panel("forward + backward", "ms", time_curves(timed)),
        Panel("peak memory beyond inputs and outputs", "MiB", memory_curves(documents["memory"])),
    ]
    note = f"fp32, causal, 8 heads of 64. {machine_line(documents['reach'].machine)}"
    plot_panels(panels, path, note, {SOURCE_KEY: source_hash(sources)})


def plot_hopper(sources: Sequence[Path], path: Path) -> None:
    """Time by length and share of the matmul rate, forward and backward, of the scaling suite."""
    (document,) = map(load, sources)
    panels = []
    for title, pass_ in (("forward", "fwd"), ("backward", "bwd")):
        times = hopper_curves(document, pass_, lambda row: 1e3 * row.median_s)
        if not times:
            continue
        shares = hopper_curves(document, pass_, lambda row: row.percent_of_peak)
        dashed = [name for name in times if name.endswith("D 64")]
        panels += [
            Panel(title, "ms", times, dashed=dashed),
            Panel(f"{title}: necessary FLOPs", "% of the matmul rate", shares, False, dashed),
        ]
    note = f"bf16, causal, 16 heads of 128, or of 64 (D 64). {machine_line(document.machine)}"
    plot_panels(panels, path, note, {SOURCE_KEY: source_hash(sources)})


def plot_ring(sources: Sequence[Path], path: Path) -> None:
    """Share of the ideal speed by length, and TFLOP/s of a GPU beside the rival's."""
    (document,) = map(load, sources)
    panels = []
    for title, pass_ in (("forward", "fwd"), ("forward + backward", "fwd_bwd")):
        ideal, rates = ring_curves(document, pass_)
        panels += [
            Panel(f"ring, {title}", "% of the ideal speed", ideal, False),
            Panel(f"ring, {title}", "TFLOP/s of a GPU", rates, False,
                  [name for name in rates if "FlashAttention" in name]),
        ]  # fmt: skip
    note = f"bf16, causal, heads of 128. {machine_line(document.machine)}"
    plot_panels(panels, path, note, {SOURCE_KEY: source_hash(sources)})


def ring_curves(document: Document, pass_: str) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Percent of the ideal speed, and TFLOP/s of a GPU, by length, per number of heads."""
    gpus = int(document.machine["kind"].rpartition("x")[2])
    rows = [r for r in document.rows if r.op == "flash" and r.pass_ == pass_ and not r.options]
    alone = {r.group: r.median_s for r in rows if r.candidate == "flash" and r.median_s}
    first = next(r.candidate for r in document.rows if r.candidate[:5] == "ring-")
    ideal: dict[str, list[tuple[int, float]]] = {}
    rates: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.status != "ok" or row.candidate not in (first, RIVAL) or row.group not in alone:
            continue
        assert row.median_s and row.flops_per_s
        name = f"{row.shape['Hq']}/{row.shape['Hkv']} heads"
        if row.candidate == RIVAL:
            name = f"on FlashAttention-2, {name}"
        else:
            speed = alone[row.group] / row.median_s
            ideal.setdefault(name, []).append((row.shape["T"], 100 * speed / gpus))
        rates.setdefault(name, []).append((row.shape["T"], row.flops_per_s / gpus / 1e12))
    return ideal, rates


def hopper_curves(
    document: Document, pass_: str, value: Callable[[Row], float]
) -> dict[str, Curve]:
    """A figure by length of each candidate but the floors, per head dimension."""
    points: dict[str, dict[int, float]] = {}
    for row in document.rows:
        if row.status == "ok" and row.pass_ == pass_ and row.op not in BASELINES:
            name = row.candidate.replace("sdpa-cudnn", "sdpa (cuDNN)")
            name += ", D 64" if row.shape["D"] == 64 else ""
            points.setdefault(name, {})[row.shape["T"]] = value(row)
    return {name: sorted(curve.items()) for name, curve in sorted(points.items(), key=_order)}


def _order(item: tuple[str, Any]) -> tuple[bool, int]:
    """As the colours are listed, D 64 last."""
    name = item[0]
    return name.endswith("D 64"), [name.startswith(method) for method in COLOURS].index(True)


def time_curves(
    documents: Sequence[Document], pass_: str = "fwd_bwd", head_dim: int = 64
) -> dict[str, Curve]:
    """Median milliseconds by length for each candidate; the last document with a length counts."""
    points: dict[str, dict[int, float]] = {}
    for row in (row for document in documents for row in document.rows):
        if row.status == "ok" and row.pass_ == pass_ and row.shape["D"] == head_dim:
            points.setdefault(row.candidate, {})[row.shape["T"]] = row.median_s * 1e3
    return {name: sorted(curve.items()) for name, curve in points.items()}


def memory_curves(document: Document, pass_: str = "fwd_bwd") -> dict[str, Curve]:
    """MiB by length for each candidate; a figure below a page counts as one page."""
    page = 4096
    return {
        row.candidate: [
            (n, max(x, page) / 2**20) for n, x in zip(row.lengths, row.extra_bytes, strict=True)
        ]
        for row in document.memory
        if row.status == "ok" and row.pass_ == pass_
    }


def source_hash(sources: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()


def hash_in_png(path: Path) -> str | None:
    """The source hash that plot_cpu wrote into a PNG's text chunk, or None."""
    data, position = Path(path).read_bytes(), 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + length]
        if kind == b"tEXt" and body.startswith(SOURCE_KEY.encode() + b"\0"):
            return body.split(b"\0", 1)[1].decode("latin-1")
        position += 12 + length
    return None
