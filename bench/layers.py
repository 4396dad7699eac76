"""Single layers at rising sparsity: the sparse kernels against the best dense ones, and where they break even.

    python -m bench.layers [--layers 'linear*'] [--zeros 0.5 0.9] [--threads 1] [--json out.json]

Every kernel of one layer takes turns in one process: Pumice's dense one, its best sparse one at each share of zero
1x4 and 4x4 blocks (also where the compiler would choose dense), and the dense int8 ones of the other engines.
``bench/kernels.py`` says what is timed of each.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from bench.break_even import break_even
from bench.kernels import Kernel, PeerKernel, PumiceKernel, time_kernels
from bench.layer_shapes import LAYERS, PATTERNS
from bench.options import speed_options
from bench.processes import fresh_processes, write_runs
from bench.tables import markdown, number
from pumice.bench import Timing
from pumice.errors import UsageError
from pumice.targets.target import Target

ZEROS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

Entry = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    layer: str
    threads: int
    zeros: tuple[float, ...]
    peers: tuple[str, ...]
    target: str
    seconds: float


def measure_layer(job: Job) -> Entry:
    """All kernels of one layer on one thread count, as an entry of the JSON's ``runs``."""
    shape = LAYERS[job.layer]
    dense = shape.weight()
    kernels: dict[str, Kernel] = {}
    facts: dict[str, Entry] = {}
    for peer in job.peers:
        kernel = PeerKernel(peer, shape, dense, job.threads)
        kernels[kernel.title] = kernel
        facts[kernel.title] = {"family": peer, "pattern": "dense", "zeros": 0.0}
    plan = [("dense", 0.0, 1), *((pattern, zeros, rows) for pattern, rows in PATTERNS.items() for zeros in job.zeros)]
    for pattern, zeros, rows in plan:
        is_dense = pattern == "dense"
        name = "Pumice dense" if is_dense else f"Pumice {pattern}, {zeros:.0%} zero"
        made = PumiceKernel(shape, shape.weight(zeros, rows), is_dense, job.target, job.threads)
        kernels[name] = made
        facts[name] = {
            "family": "pumice",
            "pattern": pattern,
            "zeros": zeros,
            "kernel": made.description,
            "nbytes": made.nbytes,
        }
    timings = time_kernels(kernels, job.seconds)
    return entry(job.layer, job.threads, shape.macs, timings, facts)


def entry(layer: str, threads: int, macs: int, timings: Sequence[Timing], facts: dict[str, Entry]) -> Entry:
    """The times of one layer's kernels with what is known of each, and the break-even of each pattern."""
    kernels = [{**timing.to_json(), **facts[timing.name]} for timing in timings]
    # Ratios to one kernel, each taken within a round, compare better than medians of the whole run.
    best = min((k for k in kernels if k["pattern"] == "dense"), key=lambda k: k["ratio"])
    for kernel in kernels:
        kernel["speedup"] = best["ratio"] / kernel["ratio"]
        kernel["gops"] = 2e-6 * macs * (1 - kernel["zeros"]) / kernel["median_ms"]  # of the work really done
    curves = {
        pattern: [(k["zeros"], k["ratio"]) for k in kernels if k["pattern"] == pattern]
        for pattern in PATTERNS
        if any(k["pattern"] == pattern for k in kernels)
    }
    even = {pattern: break_even(curve, best["ratio"]) for pattern, curve in curves.items()}
    return {
        "layer": layer,
        "threads": threads,
        "macs": macs,
        "best_dense": best["name"],
        "break_even": even,
        "kernels": kernels,
    }


def details(run: Entry) -> str:
    """The table of one run."""
    rows = [["kernel", "us", "p10", "p90", "times the best dense", "GOP/s done"]]
    for k in run["kernels"]:
        times = [number(1e3 * k[key], 2) for key in ("median_ms", "p10_ms", "p90_ms")]
        rows.append([k["name"], *times, number(k["speedup"], 2), number(k["gops"], 0)])
    return f"{run['layer']}, {run['threads']} thread(s)\n\n{markdown(rows)}\n"


def summary(runs: Sequence[Entry]) -> str:
    """One line a layer: the best dense kernel, what 90 % zero blocks bring, and where each pattern breaks even."""
    heading = ["layer", "threads", "best dense", "us", "Pumice dense"]
    rows = [
        [
            *heading,
            *(f"{pattern}, 90 % zero" for pattern in PATTERNS),
            *(f"{pattern} breaks even at" for pattern in PATTERNS),
        ]
    ]
    for run in runs:
        best = next(k for k in run["kernels"] if k["name"] == run["best_dense"])
        speedups = {(k["pattern"], k["zeros"]): k["speedup"] for k in run["kernels"] if k["family"] == "pumice"}
        even = [run["break_even"].get(pattern) for pattern in PATTERNS]
        rows.append(
            [
                run["layer"],
                str(run["threads"]),
                best["name"],
                number(1e3 * best["median_ms"], 2),
                number(speedups["dense", 0.0], 2),
                *(number(speedups.get((pattern, 0.9)), 2) for pattern in PATTERNS),
                *("never" if zeros is None else f"{zeros:.0%} zero" for zeros in even),
            ]
        )
    return markdown(rows)


def main() -> None:
    """Measure each layer on each thread count in a process of its own."""
    parser = speed_options(__doc__, ZEROS, threads=[1], seconds=20, json="out/bench/layers.json")
    parser.add_argument("--layers", nargs="+", default=["*"], metavar="GLOB", help=f"of {'; '.join(LAYERS)}")
    options = parser.parse_args()
    if Target.parse(options.target).runs_on_gpu:
        raise UsageError(f"--target {options.target}: single layers are timed on CPUs; bench.networks_speed does GPUs")
    chosen = [name for name in LAYERS if any(fnmatchcase(name, glob) for glob in options.layers)]
    if not chosen:
        raise UsageError(f"--layers {' '.join(options.layers)} names none of: {'; '.join(LAYERS)}")
    runs: list[Entry] = []
    with fresh_processes() as call:
        for layer in chosen:
            for threads in options.threads:
                shares, peers = tuple(options.zeros), tuple(options.peers)
                job = Job(layer, threads, shares, peers, options.target, options.seconds)
                print(f"{layer}, {threads} thread(s)", file=sys.stderr, flush=True)
                runs.append(call(measure_layer, job))
                print(details(runs[-1]), flush=True)
                write_runs(options.json, "layers", runs)
    print(summary(runs))


if __name__ == "__main__":
    main()
