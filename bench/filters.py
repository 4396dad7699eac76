"""Whole filters removed, without training, beside blocks: accuracy, the multiply-adds that are left, and the time.

    python -m bench.filters --data DIR --networks demo --specs filters:0.25 filters:0.5

Times are of one inference in int8 by the compiled libraries, all in turns in one process, on one thread.
"""

from __future__ import annotations

import argparse
from functools import partial

from bench.tables import markdown, number
from bench.tasks import TASKS, Task, add_task_options, compiled, evaluate
from bench.techniques import KEEP
from pumice.bench import measure
from pumice.module import layers_of
from pumice.passes import RecordLayers
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.stages import Stages

_SPECS = [
    "filters:0.125",
    "filters:0.25",
    "filters:0.375",
    "filters:0.5",
    "filters:0.25:by=activation",
    *(f"sparsegpt:1x4:{level}:refits=30" for level in (0.5, 0.6, 0.7)),
]


def accuracy(task: Task, spec: str | None) -> tuple[list[str], int]:
    """Of the network in float and in int8; and the multiply-adds with a weight that is not zero."""
    smaller = prepare(task.mod, Recipe(quantize=False).but(prune=spec), task.calibration, None, Stages(None))
    int8 = prepare(smaller, Recipe(), task.calibration, None, Stages(None))
    layers = layers_of(RecordLayers()(smaller)).values()
    found = [number(evaluate(task, mod)[task.main], 4) for mod in (smaller, int8)]
    return found, round(sum(layer.macs * (1 - layer.sparsity) for layer in layers))


def main() -> None:
    """Remove and measure, in float and in int8."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--specs", nargs="+", default=_SPECS, metavar="SPEC", help=f"default: {' '.join(_SPECS)}")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing each library")
    options = parser.parse_args()
    for network in options.networks:
        task = TASKS[network](options.data)
        keep = f":keep={KEEP[network]}" if KEEP[network] else ""
        given = [None, *(spec if spec.startswith("filters") else spec + keep for spec in options.specs)]
        measured = [accuracy(task, spec) for spec in given]
        libraries = {spec or "dense": compiled(task, Recipe().but(prune=spec), threads=1) for spec in given}
        feed = {name: array[: task.inputs[name][0]] for name, array in task.calibration.items()}
        calls = {name: partial(model, **feed) for name, model in libraries.items()}
        rows = [["", f"{task.main}, float", "int8", "multiply-adds", "ms", "times as fast"]]
        for spec, (found, macs), timing in zip(given, measured, measure(calls, options.seconds), strict=True):
            name = (spec or "dense").removesuffix(keep)
            rows.append([name, *found, f"{macs:,}", number(timing.median, 3), number(1 / timing.ratio, 2)])
        print(f"\n{network}\n\n{markdown(rows)}", flush=True)


if __name__ == "__main__":
    main()
