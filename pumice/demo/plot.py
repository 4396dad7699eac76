"""The demo's picture: accuracy against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pumice.demo.run import Entry
from pumice.errors import MissingDependencyError

_MARKERS = {"pumice": "o", "onnxruntime": "s"}


def plot(entries: Sequence[Entry], path: Path) -> None:
    """Write a PNG: one point an engine, with the range from p10 to p90 of its times.

    Raises MissingDependencyError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is needed for the plot and is not installed: `pip install matplotlib`"
        ) from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    for entry in entries:
        spread = [[max(0, entry.milliseconds - entry.p10)], [max(0, entry.p90 - entry.milliseconds)]]
        marker = _MARKERS[entry.engine]
        axes.errorbar(
            entry.milliseconds, entry.accuracy, xerr=spread, fmt=marker, capsize=3, markersize=8, label=entry.name
        )
    axes.set_xscale("log")
    axes.margins(0.15)
    for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:g}"))
    heights = [entry.accuracy for entry in entries]
    axes.set_ylim(min(heights) - 1, max(heights) + 1)  # a tenth of a point is two images: it must not look like a cliff
    axes.set_xlabel("ms for one image (median, p10 to p90; logarithmic)")
    axes.set_ylabel("% of the test images right")
    axes.set_title("Fashion-MNIST: accuracy against time")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
