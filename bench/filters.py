"""Whole filters removed, without training: accuracy, and the multiply-adds that are left.

python -m bench.filters --data DIR --networks demo --specs filters:0.25 filters:0.5
"""

from __future__ import annotations

import argparse

from bench.tables import markdown, number
from bench.tasks import TASKS, add_task_options, evaluate
from pumice.module import layers_of
from pumice.passes import RecordLayers
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.stages import Stages

_SPECS = ["filters:0.125", "filters:0.25", "filters:0.375", "filters:0.5", "filters:0.25:by=activation"]


def main() -> None:
    """Remove and measure, in float and in int8."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--specs", nargs="+", default=_SPECS, metavar="SPEC", help=f"default: {' '.join(_SPECS)}")
    options = parser.parse_args()
    for network in options.networks:
        task = TASKS[network](options.data)
        rows = [["", f"{task.main}, float", "int8", "multiply-adds"]]
        for spec in [None, *options.specs]:
            recipe = Recipe(quantize=False).but(prune=spec)
            smaller = prepare(task.mod, recipe, task.calibration, None, Stages(None))
            int8 = prepare(smaller, Recipe(), task.calibration, None, Stages(None))
            macs = sum(layer.macs for layer in layers_of(RecordLayers()(smaller)).values())
            found = [number(evaluate(task, mod)[task.main], 4) for mod in (smaller, int8)]
            rows.append([spec or "dense", *found, f"{macs:,}"])
        print(f"\n{network}\n\n{markdown(rows)}", flush=True)


if __name__ == "__main__":
    main()
