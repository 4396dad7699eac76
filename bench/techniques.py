"""Accuracy against sparsity, for every technique that needs no training: in float and in int8.

    python -m bench.techniques --data DIR

Each network of ``bench/tasks.py`` is pruned by each technique in each pattern at each level, all layers but those that
``keep`` names for it, and measured in float and in int8. Results go to a file of JSON lines, one a setting, as they
come: what is there is not done again, so a run can be stopped and goes on, and several processes can share the work
(``--part 1/2`` and ``--part 2/2``). ``--table`` prints what the file holds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tables import markdown, number
from bench.tasks import TASKS, Task, add_task_options, evaluate
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.stages import Stages

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
TECHNIQUES = {
    "magnitude": "magnitude:{pattern}",
    "wanda": "wanda:{pattern}",
    "sparsegpt": "sparsegpt:{pattern}",
    "sparsegpt, refits": "sparsegpt:{pattern}:refits=30",
}
PATTERNS = ("unstructured", "1x4", "2:4")
# The first and the last layer, which nobody prunes: they are small, and what they lose, no other layer can make up for.
KEEP = {"demo": "stem,classifier", "mobilenet": "features.0.0,classifier.*", "minilm": ""}
INT8 = {"demo": Recipe(), "mobilenet": Recipe(float_budget=0.32), "minilm": Recipe(smooth=0.5)}


@dataclass(frozen=True)
class Setting:
    """One row of the file."""

    network: str
    technique: str
    pattern: str
    level: float

    @property
    def spec(self) -> str:
        """What ``--prune`` takes."""
        what = self.pattern if ":" in self.pattern else f"{self.pattern}:{self.level}"
        keep = KEEP[self.network]
        return TECHNIQUES[self.technique].format(pattern=what) + (f":keep={keep}" if keep else "")


def settings(networks: list[str]) -> Iterator[Setting]:
    """All of them; ``dense`` first."""
    for network in networks:
        yield Setting(network, "dense", "", 0.0)
        for pattern in PATTERNS:
            for level in LEVELS if ":" not in pattern else (0.5,):
                for technique in TECHNIQUES:
                    yield Setting(network, technique, pattern, level)


def run(setting: Setting, task: Task) -> dict[str, Any]:
    """Prune, then measure in float and in int8."""
    began = time.perf_counter()
    stage, recipe = Stages(None), Recipe(quantize=False)
    if setting.technique != "dense":
        recipe = recipe.but(prune=setting.spec)
    pruned = prepare(task.mod, recipe, task.calibration, None, stage)
    seconds = time.perf_counter() - began
    int8 = prepare(pruned, INT8[setting.network], task.calibration, None, stage)
    return {
        **vars(setting),
        "float": evaluate(task, pruned),
        "int8": evaluate(task, int8),
        "pruning seconds": seconds,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; a line that a killed process left without its end is skipped."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def table(rows: list[dict[str, Any]], network: str, measure: str) -> str:
    """One network's results: a line for each pattern and technique, a column for each level, float / int8."""
    found = {(row["technique"], row["pattern"], row["level"]): row for row in rows if row["network"] == network}
    dense = found.get(("dense", "", 0.0))
    lines = [["pattern", "technique", *(f"{level:.0%}" for level in LEVELS)]]
    if dense:
        lines.append(["", "dense", f"{_cell(dense, measure)}", *[""] * (len(LEVELS) - 1)])
    for pattern in PATTERNS:
        for technique in TECHNIQUES:
            cells = [_cell(found.get((technique, pattern, level)), measure) for level in LEVELS]
            if any(cells):
                lines.append([pattern, technique, *cells])
    return markdown(lines)


def _cell(row: dict[str, Any] | None, measure: str) -> str:
    if row is None:
        return ""
    return " / ".join(number(row[kind][measure], 3) for kind in ("float", "int8"))


def main() -> None:
    """Measure what is missing, or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--results", type=Path, default=Path("out/techniques.jsonl"), help="read, and added to")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th setting, from the I-th on")
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES))
    parser.add_argument("--levels", nargs="+", type=float, choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--table", action="store_true", help="print the results, measure nothing")
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.table:
        rows = read(options.results)
        for network in options.networks:
            names = [name for row in rows if row["network"] == network for name in row["float"]]
            for name in dict.fromkeys(names):
                print(f"\n{network}, {name}, float / int8\n\n{table(rows, network, name)}")
        return
    first, count = (int(number) for number in options.part.split("/"))
    for network in options.networks:
        wanted = [
            each
            for each in settings([network])
            if each.technique in ("dense", *options.techniques) and each.level in (0.0, *options.levels)
        ]
        mine = wanted[first - 1 :: count]
        known = {(row["network"], row["technique"], row["pattern"], row["level"]) for row in read(options.results)}
        missing = [s for s in mine if (s.network, s.technique, s.pattern, s.level) not in known]
        task = TASKS[network](options.data) if missing else None
        for setting in missing:
            assert task is not None
            row = run(setting, task)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
