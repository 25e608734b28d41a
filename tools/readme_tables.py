#!/usr/bin/env python3
"""Write the README's tables and plot from the committed results; --check fails where they differ.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; the names are the keys of
TABLES.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.machine import machine_line  # noqa: E402
from bench.plot import hash_in_png, plot_cpu, source_hash  # noqa: E402
from bench.results import Document, load  # noqa: E402

CPU_SUITES = ("scaling", "reach", "memory")
CPU_PLOT = Path("docs/img/cpu.png")
MISSING = "_Not measured yet: `python -m bench.run --save` measures it._"
PASS_NAMES = {"fwd": "forward", "fwd_bwd": "forward + backward"}
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
    document = published(root / "bench/results", "reach")
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


def hopper_flash(root: Path) -> str:
    """The forward of flash_attention beside PyTorch's back ends, shape by shape."""
    document = published(root / "bench/results", "flash_fwd", "h200")
    if document is None:
        return MISSING
    lines = [
        "| B | T | Hq / Hkv | D | ours, ms | TFLOP/s | of matmul peak | cuDNN, ms | speed "
        "| FlashAttention-2, ms | speed |",
        "| --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    shapes = [r.shape for r in document.rows if r.candidate == "flash"]
    for shape in shapes:
        row = {r.candidate: r for r in document.rows if r.shape == shape}
        ours, rivals = row["flash"], (row["sdpa-cudnn"], row["sdpa-flash"])
        beside = " | ".join(
            f"{1e3 * r.median_s:.3f} | **{r.median_s / ours.median_s:.2f}x**" for r in rivals
        )
        lines.append(
            f"| {shape['B']} | {shape['T']} | {shape['Hq']} / {shape['Hkv']} | {shape['D']} "
            f"| {1e3 * ours.median_s:.3f} | {ours.flops_per_s / 1e12:.0f} "
            f"| {ours.percent_of_peak:.0f} % | {beside} |"
        )
    return "\n".join([*lines, "", _conditions(document)])


def cpu_memory(root: Path) -> str:
    """Peak bytes beyond inputs and outputs at T, 2T, 4T."""
    document = published(root / "bench/results", "memory")
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
    if not all((root / "bench/results/cpu" / f"{suite}.json").exists() for suite in CPU_SUITES):
        return MISSING
    return f"![time and peak memory against the sequence length, on a CPU]({CPU_PLOT})"


TABLES: dict[str, Callable[[Path], str]] = {
    "cpu-reach": cpu_reach,
    "cpu-memory": cpu_memory,
    "cpu-plot": cpu_plot,
    "hopper-flash": hopper_flash,
}


def render(text: str, root: Path) -> str:
    """The README's text with every table made anew."""
    names = [name for _, name, _, _ in MARKERS.findall(text)]
    opened = re.findall(r"<!-- bench:([a-z-]+) -->", text)
    unknown = [name for name in opened if name not in TABLES]
    if unknown or names != opened:
        raise DriftError(
            f"README markers {opened}: every one must be closed and be one of {', '.join(TABLES)}"
        )
    return MARKERS.sub(lambda m: f"{m[1]}{TABLES[m[2]](root)}\n{m[4]}", text)


def plot_is_current(root: Path) -> bool:
    """Whether the plot was drawn from the results as they are; true while there are none."""
    sources = [root / "bench/results/cpu" / f"{suite}.json" for suite in CPU_SUITES]
    if not all(source.exists() for source in sources):
        return True
    plot = root / CPU_PLOT
    return plot.exists() and hash_in_png(plot) == source_hash(sources)


def main(arguments: list[str] | None = None) -> int:
    """Write, or with --check compare; 1 on drift."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the README differs"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="repository root")
    options = parser.parse_args(arguments)
    root, readme = options.root, options.root / "README.md"
    try:
        text = readme.read_text(encoding="utf-8")
        wanted, current = render(text, root), plot_is_current(root)
        if options.check:
            stale = [
                name for name, ok in ((readme.name, text == wanted), (CPU_PLOT, current)) if not ok
            ]
            if stale:
                raise DriftError(
                    f"{', '.join(map(str, stale))}: not what bench/results says;"
                    f" run tools/{Path(__file__).name}"
                )
            return 0
        if not current:
            plot_cpu(
                [root / "bench/results/cpu" / f"{suite}.json" for suite in CPU_SUITES],
                root / CPU_PLOT,
            )
        if text != wanted:
            readme.write_text(wanted, encoding="utf-8")
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
