"""MiniLM-L6 at 50 % of 1x4 blocks and int8, without training: what each technique adds.

    python -m bench.shares --data DIR

The steps are added one to the other, in float; then int8 with what helps there. Results go to a file of JSON lines as
they come, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from bench.tables import markdown, number
from bench.tasks import evaluate, minilm
from bench.techniques import read
from pumice.prepare import prepare
from pumice.recipe import Recipe
from pumice.stages import Stages

_FLOAT = Recipe(quantize=False)
_PLAIN = _FLOAT.but(prune="sparsegpt:1x4:0.5")
_REFITTED = _FLOAT.but(prune="sparsegpt:1x4:0.5:refits=30")
_ORDERED = _REFITTED.but(permute=True)
_SPREAD = _ORDERED.but(prune="sparsegpt:1x4:0.5:sensitivity:refits=30")
_TRAINED = _ORDERED.but(reconstruct=200)
_WHOLE = _TRAINED.but(reconstruct_whole=True)
STEPS = {
    "dense": _FLOAT,
    "dense, int8": Recipe(),
    "dense, int8, smooth": Recipe(smooth=0.5),
    "magnitude": _FLOAT.but(prune="magnitude:1x4:0.5"),
    "wanda": _FLOAT.but(prune="wanda:1x4:0.5"),
    "sparsegpt": _PLAIN,
    "+ refits": _REFITTED,
    "+ channel order": _ORDERED,
    "+ reconstruction of blocks": _TRAINED,
    "+ of the whole": _WHOLE,
    "refits, channel order, shares by sensitivity": _SPREAD,
    "all, int8": _WHOLE.but(quantize=True),
    "all, int8, smooth": _WHOLE.but(quantize=True, smooth=0.5),
    "all, int8, smooth, gptq": _WHOLE.but(quantize=True, smooth=0.5, rounding="gptq"),
}


def main() -> None:
    """Measure what is missing, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloaded packages (bench/README.md)")
    parser.add_argument("--results", type=Path, default=Path("out/shares.jsonl"), help="read, and added to")
    parser.add_argument("--calibrate", type=int, default=1024, help="texts; half are single words")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = {row["step"] for row in read(options.results)}
    task = minilm(options.data, options.calibrate)
    for step in options.steps:
        if step in known:
            continue
        began = time.perf_counter()
        mod = prepare(task.mod, STEPS[step], task.calibration, None, Stages(None))
        row = {"step": step, "recipe": STEPS[step].to_json(), **evaluate(task, mod)}
        row["seconds"] = time.perf_counter() - began
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    rows = read(options.results)
    names = [name for name in rows[0] if name not in ("step", "recipe", "seconds")]
    cells = [[row["step"], *(number(row[name], 3) for name in names)] for row in rows]
    print(markdown([["", *names], *cells]))


if __name__ == "__main__":
    main()
