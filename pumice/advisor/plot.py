"""The advisor's picture: what is lost against time or size, and what each layer could be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pumice.advisor.advice import Advice, cost_of, front
from pumice.errors import MissingDependencyError

_COLOURS = {
    "float32": "tab:gray", "int8": "tab:blue", "frontier": "tab:green", "allocated": "tab:red", "reverted": "tab:red",
    "uniform": "tab:orange",
}  # fmt: skip
_MOST_NAMED = 24  # layers in a legend


def check_matplotlib() -> None:
    """Raise MissingDependencyError where there is none: asked before a long run, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is needed for the plot and is not installed: `pip install matplotlib`, or leave --plot out"
        ) from error


def plot(advice: Advice, path: Path) -> None:
    """Write a PNG: on the left the points, on the right the error of each layer's options over their time.

    Raises MissingDependencyError without matplotlib.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_points(left, advice)
    _draw_layers(right, advice)
    figure.suptitle(f"{advice.source} for {advice.target}")
    figure.savefig(path, dpi=130)


def _draw_points(axes: Any, advice: Advice) -> None:
    unit, scale = ("ms", 1.0) if advice.counts == "time" else ("MB", 1e-6)
    known = [point for point in advice.points if cost_of(point, advice.counts) < float("inf")]
    for kind in dict.fromkeys(point.kind for point in known):
        own = [point for point in known if point.kind == kind]
        costs = [scale * cost_of(point, advice.counts) for point in own]
        axes.scatter(costs, [point.drop for point in own], color=_COLOURS.get(kind, "black"), label=kind)
    best = front(tuple(known), advice.counts)
    axes.plot([scale * cost_of(point, advice.counts) for point in best], [point.drop for point in best], ":k", lw=1)
    if advice.chosen is not None:
        at = (scale * cost_of(advice.chosen, advice.counts), advice.chosen.drop)
        axes.annotate("chosen", at, xytext=(8, 8), textcoords="offset points")
    axes.set_xlabel(f"{unit} (the whole network)")
    axes.set_ylabel(f"drop: {advice.drop_unit}")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_layers(axes: Any, advice: Advice) -> None:
    """A line a layer: its options that no other beats at both time and error."""
    for table in advice.tables:
        best: list[tuple[float, float]] = []
        for option in sorted(table.options, key=lambda option: (option.nanoseconds, option.error)):
            if option.error > 0 and (not best or option.error < best[-1][1]):
                best.append((option.nanoseconds / 1e6, option.error))
        axes.plot(*zip(*best, strict=True), marker=".", lw=0.8, label=table.name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("ms of the layer (logarithmic)")
    axes.set_ylabel("noise over signal of the layer's output (logarithmic)")
    axes.grid(alpha=0.3)
    if len(advice.tables) <= _MOST_NAMED:
        axes.legend(fontsize="x-small")
