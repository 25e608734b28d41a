"""Curves over the sequence length, for the demo and the benchmark."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Curve = Sequence[tuple[int, float]]  # (length, value)

# One colour per method everywhere; colours of Okabe and Ito, distinct for colour-blind readers.
COLOURS = {
    "sdpa": "#6b6b6b",
    "flash": "#0072b2",
    "landmark": "#cc79a7",
    "dilated": "#e69f00",
    "infini": "#009e73",
    "merge": "#56b4e9",
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a curve per method, whose name begins with the method's."""

    title: str
    unit: str
    curves: Mapping[str, Curve]
    log: bool = True  # the values' axis; lengths are on a logarithmic one
    dashed: Collection[str] = ()  # names of curves


def short(length: float) -> str:
    """A length as on an axis.

    >>> short(1 << 20), short(2048), short(100)
    ('1M', '2k', '100')
    """
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if length >= unit:
            return f"{length / unit:g}{name}"
    return f"{length:g}"


def plot_panels(
    panels: Sequence[Panel], path: Path | str, note: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Draw the panels into a PNG, up to three side by side, `note` below, `metadata` in the file.

    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    named: set[str] = set()  # by a legend
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        lengths: set[int] = set()
        for name, curve in panel.curves.items():
            xs, ys = zip(*curve, strict=True)
            lengths.update(xs)
            axes.plot(
                xs, ys, marker="o", markersize=4, linewidth=2, label=name,
                color=COLOURS.get(re.split(r"\W", name)[0]),
                linestyle="--" if name in panel.dashed else "-",
            )  # fmt: skip
        axes.set(xscale="log", xlabel="tokens", title=f"{panel.title}, {panel.unit}")
        axes.set_xticks(sorted(lengths))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        if panel.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        else:
            axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, color="#dddddd")
        if not named.issuperset(panel.curves):
            axes.legend(frameon=False)
            named.update(panel.curves)
    figure.supxlabel(note, fontsize=8, color="#555555")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=dict(metadata or {}))
