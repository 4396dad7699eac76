"""``pumice run``: one inference."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from pumice.commands.common import Commands, add_command, refuse_to_overwrite


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands, "run", "run one inference of a compiled library", "pumice run model.so -i input.npz -o output.npz"
    )
    parser.add_argument("library", metavar="OUT.so", help="a library that `pumice compile` wrote")
    parser.add_argument("-i", "--inputs", required=True, metavar="IN.npz", help="one array an input, by its name")
    parser.add_argument("-o", "--outputs", metavar="OUT.npz", help="where the outputs go; without it, a summary only")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each core")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")


def run(args: argparse.Namespace) -> None:
    """Load, run, write, and say what came out."""
    from pumice.arrays import read_arrays, write_arrays
    from pumice.artifact import load
    from pumice.files import check_destination
    from pumice.report_table import clean, format_table

    if args.outputs:
        check_destination(args.outputs)
        refuse_to_overwrite(args.outputs, args.library, args.inputs)
    outputs = load(args.library, args.threads)(read_arrays(args.inputs))
    if args.outputs:
        write_arrays(args.outputs, outputs)
    summaries = [_summary(name, array) for name, array in outputs.items()]
    if args.json:
        print(json.dumps({"outputs": summaries, "written": args.outputs}, indent=2))
        return
    rows = [("output", "type", "shape", "min", "mean", "max")]
    for entry in summaries:
        numbers = [f"{entry[key]:.6g}" if entry[key] is not None else "-" for key in ("min", "mean", "max")]
        rows.append((clean(entry["name"]), entry["dtype"], "x".join(map(str, entry["shape"])), *numbers))
    print("\n".join(format_table(rows, 120, {"output", "type", "shape"})))
    if args.outputs:
        print(f"written to {clean(args.outputs)}")


def _summary(name: str, array: np.ndarray) -> dict[str, Any]:
    values = array.astype(np.float64)
    measured = bool(values.size) and bool(np.isfinite(values).all())
    numbers = {key: float(getattr(values, key)()) if measured else None for key in ("min", "mean", "max")}
    return {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), **numbers}
