#!/usr/bin/env python3
"""Write the pages' tables and plots from the committed results; --check fails where they differ.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; the names are the keys of
TABLES, the pages PAGES.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.hopper_tables import goals_table, rivals_table, shapes_table  # noqa: E402
from bench.machine import machine_line  # noqa: E402
from bench.plot import (  # noqa: E402
    SOURCE_KEY,
    hash_in_png,
    plot_cpu,
    plot_hopper,
    plot_ring,
    source_hash,
)
from bench.proofs import tables as proofs  # noqa: E402
from bench.results import Document, load  # noqa: E402
from bench.ring_tables import (  # noqa: E402
    ring_goals_table,
    ring_rival_table,
    ring_solo_table,
    ring_transports_table,
)

# All but the first may be absent.
PAGES = tuple(
    Path(page) for page in ("README.md", "docs/hopper_results.md", "docs/proofs.md", "docs/ring.md")
)
RESULTS = Path("bench/results")
GPU, GPUS = "h200", "h200x2"


class Plot(NamedTuple):
    """An image, the results it is drawn from, and what draws it."""

    path: Path
    sources: tuple[Path, ...]
    draw: Callable[[Sequence[Path], Path], None]

    def measured(self, root: Path) -> bool:
        """Whether all of its sources are there."""
        return all((root / source).exists() for source in self.sources)

    def is_current(self, root: Path) -> bool:
        """Whether it was drawn from the results as they are; true while there are none."""
        if not self.measured(root):
            return True
        path = root / self.path
        return path.exists() and hash_in_png(path) == source_hash(
            [root / source for source in self.sources]
        )


CPU_SOURCES = tuple(RESULTS / "cpu" / f"{suite}.json" for suite in ("scaling", "reach", "memory"))
CPU_PLOT = Plot(Path("docs/img/cpu.png"), CPU_SOURCES, plot_cpu)
HOPPER_PLOT = Plot(Path("docs/img/h200.png"), (RESULTS / GPU / "scaling.json",), plot_hopper)
RING_PLOT = Plot(Path("docs/img/ring.png"), (RESULTS / GPUS / "ring.json",), plot_ring)
PROOFS = RESULTS / GPU / "proofs"
PROOFS_PLOT = Plot(
    Path("docs/img/proofs.png"),
    tuple(PROOFS / f"train-{method}.json" for method in proofs.ORDER),
    lambda sources, path: proofs.plot(sources, path, {SOURCE_KEY: source_hash(sources)}),
)
PLOTS = (CPU_PLOT, HOPPER_PLOT, RING_PLOT, PROOFS_PLOT)
MISSING = "_Not measured yet: `python -m bench.run --save` measures it._"
NO_RING = "_Not measured yet: `torchrun --nproc-per-node 2 -m bench.ring --save` measures it._"
PASS_NAMES = {"fwd": "forward", "fwd_bwd": "forward + backward", "bwd": "backward"}
MARKERS = re.compile(r"(<!-- bench:([a-z-]+) -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)


class DriftError(Exception):
    """The README cannot be made, or is not what the results say; the message is one line."""


def published(folder: Path, suite: str, machine: str = "cpu") -> Document | None:
    """The committed document of a suite, or None; unchecked results are refused."""
    path = folder / machine / f"{suite}.json"
    if not path.exists():
        return None
    document = load(path)
    if not document.checked or document.quick or document.failed:
        raise DriftError(f"{path}: results that are unchecked, quick or failed cannot be published")
    return document


def cpu_reach(root: Path) -> str:
    """Our time beside that of the competitor, for every goal."""
    document = published(root / RESULTS, "reach")
    if document is None:
        return MISSING
    times = {(r.candidate, r.pass_, r.shape["T"], r.shape["D"]): r for r in document.rows}
    lines = [
        "| T | D | pass | ours | time, ms | against | time, ms | speed | goal | of matmul peak |",
        "| --: | --: | --- | --- | --: | --- | --: | --: | --: | --: |",
    ]
    for goal in document.goals:
        T, D = goal.shape["T"], goal.shape["D"]
        ours, theirs = (times[name, goal.pass_, T, D] for name in (goal.candidate, goal.versus))
        speed = "not measured" if goal.speed is None else f"**{goal.speed:.2f}x**"
        lines.append(
            f"| {T} | {D} | {PASS_NAMES[goal.pass_]} | {ours.candidate} | {_ms(ours.median_s)} "
            f"| {theirs.candidate} | {_ms(theirs.median_s)} | {speed} "
            f"| {goal.wanted:g}x{'' if goal.reached else ' (missed)'} "
            f"| {'-' if ours.percent_of_peak is None else f'{ours.percent_of_peak:.0f} %'} |"
        )
    return "\n".join([*lines, "", _conditions(document)])


def hopper_rivals(root: Path) -> str:
    """Dense attention beside cuDNN and the FlashAttentions, shape by shape."""
    document = published(root / RESULTS, "rivals", GPU)
    return MISSING if document is None else _with_conditions(rivals_table(document), document)


def cpu_memory(root: Path) -> str:
    """Peak bytes beyond inputs and outputs at T, 2T, 4T."""
    document = published(root / RESULTS, "memory")
    if document is None:
        return MISSING
    rows = [row for row in document.memory if row.status == "ok"]
    lengths = rows[0].lengths
    columns = " | ".join(f"T = {n}, MiB" for n in lengths)
    lines = [f"| op | pass | {columns} | growth |", "| --- | --- |" + " --: |" * (len(lengths) + 1)]
    for row in rows:
        sizes = " | ".join(f"{x / 2**20:.1f}" for x in row.extra_bytes)
        lines.append(f"| {row.candidate} | {PASS_NAMES[row.pass_]} | {sizes} | {row.growth:.1f}x |")
    return "\n".join([*lines, "", _conditions(document)])


def cpu_plot(root: Path) -> str:
    """The image, or the note that nothing is measured yet."""
    return _image(CPU_PLOT, "time and peak memory against the sequence length, on a CPU", root)


def hopper_plot(root: Path) -> str:
    """The image, or the note that nothing is measured yet."""
    return _image(HOPPER_PLOT, "time against the sequence length, on an H200", root)


def proofs_plot(root: Path) -> str:
    """The image, or the note that nothing is measured yet."""
    if not PROOFS_PLOT.measured(root):
        return proofs.MISSING
    return f"![pass keys, bits per byte and gates of small models]({PROOFS_PLOT.path})"


def proofs_table(make: Callable[[Path], str]) -> Callable[[Path], str]:
    """A table of the proofs' results."""
    return lambda root: make(root / PROOFS)


def _image(plot: Plot, text: str, root: Path) -> str:
    if not plot.measured(root):
        return MISSING
    for source in plot.sources:
        published(root / RESULTS, source.stem, source.parent.name)
    return f"![{text}]({plot.path})"


def hopper_goals(suite: str, what: str) -> Callable[[Path], str]:
    """Every goal of a Hopper suite, its lengths in one line."""

    def table(root: Path) -> str:
        document = published(root / RESULTS, suite, GPU)
        return (
            MISSING if document is None else _with_conditions(goals_table(document, what), document)
        )

    return table


def hopper_shapes(*labels: str, suite: str = "hopper") -> Callable[[Path], str]:
    """Every shape of the goals whose label begins so."""

    def table(root: Path) -> str:
        document = published(root / RESULTS, suite, GPU)
        lines = [] if document is None else shapes_table(document, *labels)
        if document is None or len(lines) == 2:
            return MISSING
        return _with_conditions(lines, document)

    return table


def ring_goals(root: Path) -> str:
    """The ring on two GPUs against one, for every goal."""
    document = published(root / RESULTS, "ring", GPUS)
    return NO_RING if document is None else _with_conditions(ring_goals_table(document), document)


def ring_transports(root: Path) -> str:
    """Every transport at every shape."""
    document = published(root / RESULTS, "ring", GPUS)
    if document is None:
        return NO_RING
    return _with_conditions(ring_transports_table(document), document)


def ring_rival(root: Path) -> str:
    """The ring against one on FlashAttention-2."""
    document = published(root / RESULTS, "ring", GPUS)
    lines = [] if document is None else ring_rival_table(document)
    if document is None or len(lines) == 2:
        return NO_RING
    return _with_conditions(lines, document)


def ring_solo(root: Path) -> str:
    """What one GPU says of the ring on two."""
    document = published(root / RESULTS, "ring_solo", GPU)
    if document is None:
        return "_Not measured yet: `python -m bench.ring_solo --save` measures it._"
    return _with_conditions(ring_solo_table(document), document)


def ring_plot(root: Path) -> str:
    """Share of the ideal speed by length, for docs/ring.md."""
    image = _image(RING_PLOT, "share of the ideal speed of two GPUs by length", root)
    return image.replace("(docs/", "(")


def _with_conditions(lines: list[str], document: Document) -> str:
    rates = [f"{dtype} matmul {x / 1e12:.0f} TFLOP/s" for dtype, x in document.peak_flops.items()]
    if document.copy_bytes_per_s is not None:
        rates.append(f"copy {document.copy_bytes_per_s / 1e12:.2f} TB/s, read and written")
    return "\n".join([*lines, "", f"{', '.join(rates)}. {_conditions(document)}"])


TABLES: dict[str, Callable[[Path], str]] = {
    "cpu-reach": cpu_reach,
    "cpu-memory": cpu_memory,
    "cpu-plot": cpu_plot,
    "hopper-plot": hopper_plot,
    "hopper-goals": hopper_goals("hopper", "forward"),
    "backward-goals": hopper_goals("backward", "backward"),
    "backward-shapes": hopper_shapes("flash", "landmark", "dilated", "infini", suite="backward"),
    "hopper-rivals": hopper_rivals,
    "hopper-dense": hopper_shapes("flash", "fp32 carry"),
    "hopper-landmark": hopper_shapes("landmark"),
    "hopper-dilated": hopper_shapes("dilated"),
    "hopper-infini": hopper_shapes("infini"),
    "hopper-decode": hopper_shapes("one token"),
    "proofs-plot": proofs_plot,
    "proofs-training": proofs_table(proofs.training),
    "proofs-steps": proofs_table(proofs.steps),
    "proofs-headline": proofs_table(proofs.headline),
    "proofs-generation": proofs_table(proofs.generation),
    "ring-goals": ring_goals,
    "ring-transports": ring_transports,
    "ring-rival": ring_rival,
    "ring-solo": ring_solo,
    "ring-plot": ring_plot,
}


def render(text: str, root: Path) -> str:
    """A page's text with every table made anew."""
    names = [name for _, name, _, _ in MARKERS.findall(text)]
    opened = re.findall(r"<!-- bench:([a-z-]+) -->", text)
    unknown = [name for name in opened if name not in TABLES]
    if unknown or names != opened:
        raise DriftError(
            f"markers {opened}: every one must be closed and be one of {', '.join(TABLES)}"
        )
    return MARKERS.sub(lambda m: f"{m[1]}{TABLES[m[2]](root)}\n{m[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Write, or with --check compare; 1 on drift."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the README differs"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="repository root")
    options = parser.parse_args(arguments)
    root = options.root
    try:
        texts = {
            page: (root / page).read_text(encoding="utf-8")
            for page in PAGES
            if page == PAGES[0] or (root / page).exists()
        }
        wanted = {page: render(text, root) for page, text in texts.items()}
        pages = [page for page, text in texts.items() if text != wanted[page]]
        plots = [plot for plot in PLOTS if not plot.is_current(root)]
        if options.check:
            stale = [*pages, *(plot.path for plot in plots)]
            if stale:
                raise DriftError(
                    f"{', '.join(map(str, stale))}: not what bench/results says;"
                    f" run tools/{Path(__file__).name}"
                )
            return 0
        for plot in plots:
            plot.draw([root / source for source in plot.sources], root / plot.path)
        for page in pages:
            (root / page).write_text(wanted[page], encoding="utf-8")
    except (DriftError, ValueError, OSError, ImportError) as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 1
    return 0


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _conditions(document: Document) -> str:
    return f"{machine_line(document.machine)}; {document.date}."


if __name__ == "__main__":
    sys.exit(main())
