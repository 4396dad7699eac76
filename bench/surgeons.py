"""How well zeros are chosen when the weights that are left make up for them: one layer of MiniLM-L6 after the other.

    python -m bench.surgeons --data DIR

SparseGPT's one pass, its refits, and Optimal Brain Compression, on the second moments of a layer's inputs over
calibration texts: the noise that the zeros bring to the layer's output, and the seconds that it takes. Of each layer
some rows are looked at, by themselves: rows depend on each other only in how many zeros each gets.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import tvm

from bench.tables import markdown, number
from bench.tasks import minilm
from pumice.module import weights_of
from pumice.passes import OBC, RecordLayers, SimplifyModel, SparseGPT
from pumice.passes.layers import find_layers
from pumice.passes.prune_rows import prune_rows
from pumice.passes.statistics import input_moments, output_error
from pumice.patterns import Pattern

_LAYERS = ("layer.2.attention.self.query", "layer.2.intermediate.dense", "layer.2.output.dense")
_PATTERNS = ("1x4", "unstructured", "2:4")
_LEVELS = (0.5, 0.8)


def main() -> None:
    """Print a line for each layer, pattern and level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloaded packages (bench/README.md)")
    parser.add_argument("--layers", nargs="+", default=list(_LAYERS), help="by the ends of their names")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--calibrate", type=int, default=512, help="texts")
    options = parser.parse_args()
    task = minilm(options.data, options.calibrate)
    mod = tvm.transform.Sequential([SimplifyModel(), RecordLayers()])(task.mod)
    layers = [layer for layer in find_layers(mod) if layer.name.endswith(tuple(options.layers))]
    moments = input_moments(mod, task.calibration, layers)
    lines = [["layer", "pattern", "zeros", "one pass", "30 refits", "OBC"]]
    for layer in layers:
        rows = layer.to_rows(weights_of(mod)[layer.weight.name])[: options.rows]
        for text in _PATTERNS:
            pattern = Pattern.parse(text)
            for level in _LEVELS if pattern.amount is None else (pattern.amount,):
                one_pass = SparseGPT(pattern, level)
                cells = []
                for spec in (one_pass, replace(one_pass, refits=30), OBC(pattern, level)):
                    began = time.perf_counter()
                    pruned = prune_rows(rows, spec, level, moments[layer.name])
                    seconds = time.perf_counter() - began
                    error = output_error(rows, pruned, moments[layer.name])
                    cells.append(f"{number(100 * error, 3)} % ({number(seconds, 2)} s)")
                lines.append([layer.name, text, f"{level:.0%}", *cells])
                print(" | ".join(lines[-1]), flush=True)
    print(markdown(lines))


if __name__ == "__main__":
    main()
