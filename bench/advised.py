"""The advisor against uniform settings at one latency, on data that neither saw.

    python -m bench.advised --data DIR

For each network of ``bench/tasks.py``: what ``pumice advise --latency SHARE`` allocates, and beside it every technique
in every pattern on all layers alike, and filters and heads removed, as much of it as takes no longer. The advisor
chooses by the task's measure; what keeps to the limit is then measured on data that are held back from that too. Each
is timed in turns with dense int8. What was found goes into work files, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench import tasks
from bench.tables import markdown, number
from bench.tasks import TASKS, Run, Task, add_task_options, compiled
from bench.techniques import INT8
from pumice.advise import Effort, advise_model
from pumice.advisor.advice import Advice, Point, cost_of
from pumice.advisor.budget import Budget
from pumice.advisor.removals import REMOVALS
from pumice.advisor.subjects import Space
from pumice.evaluation import Metric

# The measures that lose: the worst of them is the drop.
_MEASURES = {"demo": ("top-1",), "mobilenet": ("top-1 as float", "in top-5"), "minilm": ("cosine", "WordSim-353")}


def advise(name: str, task: Task, options: argparse.Namespace) -> Advice:
    """Run the advisor on a task."""

    def measured(run: Run) -> Mapping[str, float]:
        found = task.measure(lambda feed: np.asarray(next(iter(run(feed).values()))))  # type: ignore[attr-defined]
        return {measure: found[measure] for measure in _MEASURES[name]}

    return advise_model(
        task.model,
        inputs=task.inputs,
        calibration=task.calibration,
        metric=Metric(Path(tasks.__file__), name, measured),
        budget=Budget.parse("latency", options.latency),
        base=INT8[name].but(reconstruct=options.reconstruct),
        space=Space(patterns=tuple(options.patterns), levels=tuple(options.levels), removals=tuple(options.removals)),
        effort=Effort(trials=options.trials, points=options.points, processes=options.processes),
        threads=options.threads,
        work_file=options.work / f"advised-{name}.jsonl",
        tell=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )


def table(name: str, task: Task, advice: Advice, options: argparse.Namespace) -> str:
    """Dense int8, what was allocated, and the uniform settings, the least drop first; what takes longer is left out."""
    wanted = {"int8": 0, "allocated": 1, "frontier": 1, "uniform": 2}
    (dense,) = (point for point in advice.points if point.kind == "int8")
    assert advice.budget is not None
    limit = advice.budget.limit(1e6 * cost_of(dense, "time")) / 1e6
    kept = [point for point in advice.points if cost_of(point, "time") <= limit and point.kind in wanted]
    rows = []
    for point in [dense, *sorted(kept, key=lambda point: (wanted[point.kind], point.drop))]:
        outcome, held = point.outcome, _held(task, point, options.threads)
        share = cost_of(point, "time") / cost_of(dense, "time")
        values = [*(outcome.metrics[measure] for measure in _MEASURES[name]), *held.values()]
        label = f"{point.label}, chosen" if point.chosen else point.label
        times = [number(cost_of(point, "time"), 3), f"{share:.0%}"]
        rows.append([label, *times, *(number(value, 4) for value in values), number(outcome.cosine, 3)])
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    return markdown([[name, "ms", "of dense int8", *_MEASURES[name], *held, "cosine of outputs"], *rows])


def _held(task: Task, point: Point, threads: int | None) -> dict[str, float]:
    """The measures that the advisor did not choose by."""
    if task.held is None:
        return {}
    library = compiled(task, point.recipe, threads)
    return task.held(lambda feed: np.asarray(next(iter(library(**feed).values()))))


def main() -> None:
    """Advise, print the table of each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--latency", default="60%", help="what may be taken: 8ms, or a share of dense int8")
    parser.add_argument("--patterns", nargs="+", default=["1x4", "4x4", "unstructured"])
    parser.add_argument("--levels", nargs="+", type=float, default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--removals", nargs="*", default=REMOVALS, help="tried before, one method after the other")
    parser.add_argument("--reconstruct", type=int, default=0, help="steps, of whatever makes weights zero")
    parser.add_argument("--calibrate", type=int, help="samples (default: the task's)")
    parser.add_argument("--trials", type=int, default=40, help="choices that the search for sensitivities scores")
    parser.add_argument("--points", type=int, default=3, help="of the frontier")
    parser.add_argument("--processes", type=int, default=1, help="for the errors of the layers' options")
    parser.add_argument("--threads", type=int, help="of the libraries")
    parser.add_argument("--work", type=Path, default=Path("out"), help="folder of the work files")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        task = TASKS[name](options.data, options.calibrate) if options.calibrate else TASKS[name](options.data)
        advice = advise(name, task, options)
        print(f"\n{table(name, task, advice, options)}\n")
        for remark in advice.remarks:
            print(f"- {remark}")


if __name__ == "__main__":
    main()
