"""The advisor against uniform settings at one latency, on data that neither saw.

    python -m bench.advised --data DIR

For each network of ``bench/tasks.py``: what ``pumice advise --latency SHARE`` allocates, and beside it every technique
in every pattern on all layers alike, as much of it as takes no longer. Each is compiled, measured by the task and timed
in turns with dense int8. What was found goes into work files, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench import tasks
from bench.tables import markdown, number
from bench.tasks import TASKS, Run, Task, add_task_options
from bench.techniques import INT8
from pumice.advise import Effort, advise_model
from pumice.advisor.advice import Advice
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
        base=INT8[name],
        space=Space(patterns=tuple(options.patterns), levels=tuple(options.levels), removals=tuple(options.removals)),
        effort=Effort(trials=options.trials, points=options.points, processes=options.processes),
        threads=options.threads,
        work_file=options.work / f"advised-{name}.jsonl",
        tell=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )


def table(name: str, advice: Advice) -> str:
    """Dense int8, what was allocated, and the uniform settings, the least drop first."""
    wanted = {"int8": 0, "allocated": 1, "uniform": 2}
    points = [point for point in advice.points if point.kind in wanted]
    (dense,) = (point for point in points if point.kind == "int8")
    lines = [[name, "ms", "of dense int8", *_MEASURES[name], "cosine of outputs"]]
    for point in sorted(points, key=lambda point: (wanted[point.kind], point.drop)):
        outcome = point.outcome
        assert outcome.milliseconds is not None and dense.outcome.milliseconds is not None
        share = outcome.milliseconds / dense.outcome.milliseconds
        values = [number(outcome.metrics[measure], 4) for measure in _MEASURES[name]]
        label = f"{point.label}, chosen" if point.chosen else point.label
        lines.append([label, number(outcome.milliseconds, 3), f"{share:.0%}", *values, number(outcome.cosine, 3)])
    return markdown(lines)


def main() -> None:
    """Advise, print the table of each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--latency", default="60%", help="what may be taken: 8ms, or a share of dense int8")
    parser.add_argument("--patterns", nargs="+", default=["1x4", "4x4", "unstructured"])
    parser.add_argument("--levels", nargs="+", type=float, default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--removals", nargs="*", default=REMOVALS, help="tried before, one method after the other")
    parser.add_argument("--trials", type=int, default=40, help="choices that the search for sensitivities scores")
    parser.add_argument("--points", type=int, default=3, help="of the frontier")
    parser.add_argument("--processes", type=int, default=1, help="for the errors of the layers' options")
    parser.add_argument("--threads", type=int, help="of the libraries")
    parser.add_argument("--work", type=Path, default=Path("out"), help="folder of the work files")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        advice = advise(name, TASKS[name](options.data), options)
        print(f"\n{table(name, advice)}\n")
        for remark in advice.remarks:
            print(f"- {remark}")


if __name__ == "__main__":
    main()
