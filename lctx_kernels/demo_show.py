"""What `lctx demo` shows: progress bar (rich), table and plot (matplotlib)."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .demo_plot import Panel, plot_panels

if TYPE_CHECKING:
    from .demo import Result

COLUMNS = (
    "tokens",
    "method",
    "time, ms",
    "extra memory, MiB",
    "x SDPA",
    "error",
    "gradient error",
    "check",
)


class Progress:
    """A bar that says what is being measured; plain lines without a terminal or without rich."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._total = total

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return self
            columns = (progress.TextColumn("{task.description:<24}"), progress.BarColumn(),
                       progress.MofNCompleteColumn(), progress.TimeElapsedColumn())  # fmt: skip
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self._total, completed=-1)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, what: str) -> None:
        """The part before `what` is done; `what` begins."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=what)
        else:
            print(f"  {what}", file=sys.stderr, flush=True)


def say(line: str, *, error: bool = False) -> None:
    """One line, unwrapped, to standard output or standard error."""
    print(line, file=sys.stderr if error else sys.stdout, flush=True)


def table_rows(results: "Sequence[Result]") -> list[tuple[str, ...]]:
    """The cells of the table, one tuple per result."""
    rows: list[tuple[str, ...]] = []
    for result in results:
        cells = (
            str(result.length),
            result.method,
            _cell(result.seconds, lambda x: f"{x * 1e3:.1f}"),
            _cell(result.extra_bytes, lambda x: f"{x / 2**20:.1f}"),
            _cell(result.speedup, lambda x: f"{x:.2f}"),
            _cell(result.error, lambda x: f"{x:.1e}"),
            _cell(result.gradient_error, lambda x: f"{x:.1e}"),
            "FAILED" if result.failures else "-" if result.method == "sdpa" else "ok",
        )
        rows.append(cells)
    return rows


def show_table(results: "Sequence[Result]") -> None:
    """Print the results, one block of lines per length."""
    rows = [COLUMNS, *table_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    previous = ""
    for row in rows:
        if row[0] != previous:
            print()
        previous = row[0]
        cells = (
            c.ljust(w) if i in (1, 7) else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    print("\nerror: RMS relative to the fp64 definition (sampled rows of out; short gradients)\n")


def write_plot(results: "Sequence[Result]", path: Path, note: str) -> None:
    """Time and memory against the length; without matplotlib, a line saying so."""
    methods = dict.fromkeys(result.method for result in results if result.speedup is not None)

    def curves(value: str, factor: float) -> dict[str, list[tuple[int, float]]]:
        points = {
            name: [
                (r.length, getattr(r, value) * factor)
                for r in results
                if r.method == name and getattr(r, value)
            ]
            for name in methods
        }
        return {name: curve for name, curve in points.items() if curve}

    panels = [
        Panel("forward + backward", "ms", curves("seconds", 1e3)),
        Panel("peak memory beyond inputs and outputs", "MiB", curves("extra_bytes", 2**-20)),
    ]
    try:
        plot_panels([panel for panel in panels if panel.curves], path, note)
    except ImportError:
        say("no plot: matplotlib is not installed (pip install 'lctx_kernels[bench]')")
        return
    say(f"wrote {path}")


def _cell(value: Any, form: Any) -> str:
    return "-" if value is None else str(form(value))
