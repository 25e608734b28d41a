"""Curves over the sequence length on logarithmic axes, for the demo and the benchmark."""

from collections.abc import Mapping, Sequence
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
    """One pair of axes: a curve per method."""

    title: str
    unit: str
    curves: Mapping[str, Curve]


def plot_panels(
    panels: Sequence[Panel], path: Path | str, note: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Draw the panels side by side into a PNG, `note` below them, `metadata` into the file.

    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lengths: set[int] = set()
        for name, curve in panel.curves.items():
            xs, ys = zip(*curve, strict=True)
            lengths.update(xs)
            axes.plot(
                xs, ys, marker="o", markersize=4, linewidth=2, color=COLOURS.get(name), label=name
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=f"{panel.title}, {panel.unit}")
        axes.set_xticks(sorted(lengths))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, color="#dddddd")
        axes.legend(frameon=False)
    figure.supxlabel(note, fontsize=8, color="#555555")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata=dict(metadata or {}))
