"""Draw what the other benchmarks wrote: speed against sparsity, networks against the other engines, a roofline.

    python -m bench.plots [--from out/bench] [--to out/bench]

Reads ``layers.json``, ``networks.json`` and ``machine.json`` of the folder, as many as there are, and writes a
picture for each kind and thread count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.layer_shapes import PATTERNS
from pumice.errors import MissingDependencyError, UsageError

Entry = dict[str, Any]

_COLUMNS = 3  # of small plots beside each other


def main() -> None:
    """Write the plots and say which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, default=Path("out/bench"), help="folder of the JSON files")
    parser.add_argument("--to", type=Path, help="folder of the plots (default: the same)")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    options = parser.parse_args()
    written = draw_all(options.source, options.to or options.source, options.format)
    if not written:
        raise UsageError(
            f"{options.source}: no layers.json or networks.json there; run bench.layers, bench.networks_speed"
        )
    print("".join(f"written: {path}\n" for path in written), end="")


def draw_all(source: Path, to: Path, kind: str = "svg") -> list[Path]:
    """The plots of all JSON files in ``source``, written to ``to``; ``kind`` is svg or png.

    Raises MissingDependencyError without matplotlib.
    """
    layers, networks, machines = (_by_threads(source / f"{name}.json") for name in ("layers", "networks", "machine"))
    figures: dict[str, Any] = {}
    for threads, runs in layers.items():
        figures[f"sparsity-{threads}"] = sparsity_figure(runs)
        if threads in machines:
            figures[f"roofline-{threads}"] = roofline_figure(runs, machines[threads][0])
    for threads, runs in networks.items():
        figures[f"networks-{threads}"] = networks_figure(runs)
    to.mkdir(parents=True, exist_ok=True)
    paths = {to / f"{name}.{kind}": figure for name, figure in figures.items()}
    for path, figure in paths.items():
        figure.savefig(path, dpi=150)
    return list(paths)


def sparsity_figure(runs: Sequence[Entry]) -> Any:
    """For each layer the speed of each pattern over the share of zero blocks, with the best dense kernel as 1."""
    figure, grid = _grid(len(runs))
    for axes, run in zip(grid, runs, strict=False):
        for pattern in PATTERNS:
            curve = sorted((k["zeros"], k["speedup"]) for k in run["kernels"] if k["pattern"] == pattern)
            axes.plot([100 * zeros for zeros, _ in curve], [speed for _, speed in curve], marker="o", label=pattern)
            if (even := run["break_even"].get(pattern)) is not None:
                axes.axvline(100 * even, color=axes.lines[-1].get_color(), linestyle=":", linewidth=1)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"{run['layer']}\ndense: {run['best_dense']}", fontsize="small")
        axes.grid(alpha=0.3)
    grid[0].legend(fontsize="small")
    figure.supxlabel("% of the blocks zero (dotted: breaks even)", fontsize="small")
    figure.supylabel("times as fast as the best dense int8", fontsize="small")
    return figure


def networks_figure(runs: Sequence[Entry]) -> Any:
    """For each network the time of every engine, with the range from p10 to p90."""
    figure, grid = _grid(len(runs))
    for axes, run in zip(grid, runs, strict=False):
        engines = run["engines"]
        places = range(len(engines))
        times = [e["median_ms"] for e in engines]
        spread = [
            [max(0.0, e["median_ms"] - e["p10_ms"]) for e in engines],
            [max(0.0, e["p90_ms"] - e["median_ms"]) for e in engines],
        ]
        colours = ["tab:green" if e["family"] == "pumice" else "tab:grey" for e in engines]
        axes.barh(places, times, xerr=spread, color=colours, error_kw={"linewidth": 1})
        axes.set_yticks(places, [e["name"] for e in engines], fontsize="x-small")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.1 * max(times))  # a p90 of a disturbed run must not squeeze the bars
        axes.set_title(run["network"], fontsize="small")
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("ms for one inference (median, p10 to p90)", fontsize="small")
    return figure


def roofline_figure(runs: Sequence[Entry], machine: Entry) -> Any:
    """Operations really done a second over operations for each byte touched, under what the machine can do."""
    figure, (axes,) = _grid(1, columns=1, size=(8, 6))
    peak = machine["gops"]["int8"]
    lowest = 1.0
    for level, bandwidth in machine["gbytes"].items():
        ridge = peak / bandwidth
        axes.plot([lowest, ridge], [lowest * bandwidth, peak], color="grey", linewidth=1)
        axes.annotate(level, (lowest, lowest * bandwidth), fontsize="x-small", color="grey")
    axes.axhline(peak, color="black", linewidth=1, label="int8 products in registers")
    for pattern, marker in {"dense": "s", **dict(zip(PATTERNS, "o^", strict=True))}.items():
        points = [
            (k["gops"] * 1e6 * k["median_ms"] / k["nbytes"], k["gops"])
            for run in runs
            for k in run["kernels"]
            if k["family"] == "pumice" and k["pattern"] == pattern
        ]
        axes.scatter(*zip(*points, strict=True), marker=marker, s=16, alpha=0.7, label=f"Pumice {pattern}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("operations for each byte of weights, lists, input and output")
    axes.set_ylabel("GOP/s of the work really done")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _grid(count: int, columns: int = _COLUMNS, size: tuple[float, float] = (4.5, 3.2)) -> tuple[Any, list[Any]]:
    """A figure of ``count`` small plots."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is needed for the plots and is not installed: `pip install matplotlib`"
        ) from error
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _by_threads(path: Path) -> dict[int, list[Entry]]:
    """The runs of a benchmark's JSON by thread count; none where there is no file."""
    found: dict[int, list[Entry]] = {}
    for run in json.loads(path.read_text())["runs"] if path.is_file() else []:
        found.setdefault(run["threads"], []).append(run)
    return found


if __name__ == "__main__":
    main()
