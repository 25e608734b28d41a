"""A heat map of scores: depth by length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .score import Score


def heat_map(scores: Sequence[Score], path: Path | str, title: str = "") -> None:
    """Write the mean score for every length and depth as an image.

    Args:
        scores: At least one.
        path: Image to write (.png, .svg).
        title: Above the map.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is missing; try: pip install 'lctx_kernels[bench]'"
        ) from error
    lengths = sorted({score.length for score in scores})
    depths = sorted({score.depth for score in scores})
    figure = Figure(figsize=(2 + 0.8 * len(lengths), 1.6 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    for y, depth in enumerate(depths):
        for x, length in enumerate(lengths):
            cell = [s.score for s in scores if (s.length, s.depth) == (length, depth)]
            if cell:
                mean = sum(cell) / len(cell)
                axes.add_patch(_square(x, y, mean))
                axes.text(x, y, f"{100 * mean:.0f}", ha="center", va="center")
    axes.set(
        xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5), title=title,
        xlabel="length, tokens", ylabel="depth", xticks=range(len(lengths)),
        yticks=range(len(depths)), xticklabels=lengths, yticklabels=[f"{d:.2f}" for d in depths],
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def _square(x: int, y: int, mean: float):  # type: ignore[no-untyped-def]
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, color=colormaps["RdYlGn"](mean))
