"""``pumice compile``: a model file to a library, with the table of what became of each layer."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from pumice.commands.common import (
    Commands,
    add_command,
    add_input_shapes,
    parse_shapes,
    refuse_to_overwrite,
    terminal_width,
)


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "compile",
        "compile a model into a shared library",
        "pumice compile model.onnx -o model.so --calibration images.npz --prune magnitude:1x4:0.9",
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx or .pt2 file")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.so", help="the library to write")
    parser.add_argument(
        "--target",
        default="native",
        metavar="NAME",
        help="native (this machine), x86-64-v3, x86-64-v4, x86-64-v4-vnni, ..., or a TVM target as JSON",
    )
    add_input_shapes(parser)
    parser.add_argument("--calibration", metavar="FILE.npz", help="samples, one array an input: int8 needs them")
    parser.add_argument(
        "--calibration-method",
        default="minmax",
        metavar="METHOD",
        help="how a range is chosen: minmax (default), percentile, entropy or mse",
    )
    parser.add_argument("--prune", metavar="SPEC", help="prune first, as in magnitude:1x4:0.9")
    parser.add_argument("--masks", metavar="FILE", help=".safetensors or .npz of 0/1 arrays by weight name")
    parser.add_argument(
        "--keep-float", action="append", default=[], metavar="GLOB", help="layers that stay float32 (repeatable)"
    )
    parser.add_argument("--no-equalize", action="store_true", help="do not scale channels to one range before")
    parser.add_argument("--no-correct-bias", action="store_true", help="do not take mean rounding errors out of biases")
    parser.add_argument("--no-quantize", action="store_true", help="compile in float32")
    parser.add_argument("--threads", type=int, metavar="N", help="what the library runs on by default")
    parser.add_argument("--json", action="store_true", help="the manifest as JSON instead of the table")


def run(args: argparse.Namespace) -> None:
    """Compile, write, report."""
    from pumice.driver import compile_model
    from pumice.report_table import clean, format_bytes
    from pumice.targets.library import check_destination

    output = Path(args.output)
    check_destination(output)
    refuse_to_overwrite(output, args.model, args.calibration, args.masks)
    artifact = compile_model(
        args.model,
        target=args.target,
        inputs=parse_shapes(args.input) or None,
        calibration=args.calibration,
        calibration_method=args.calibration_method,
        prune=args.prune,
        masks=args.masks,
        keep_float=args.keep_float,
        quantize=not args.no_quantize,
        equalize=not args.no_equalize,
        correct_bias=not args.no_correct_bias,
        threads=args.threads,
        progress=show_progress,
    )
    artifact.save(output)
    size = output.stat().st_size
    if args.json:
        print(json.dumps({**artifact.manifest, "library": {"file": str(output), "bytes": size}}, indent=2))
        return
    print(artifact.report(terminal_width()))
    print(f"library: {clean(str(output))}, {format_bytes(size)}")


def show_progress(stage: str, seconds: float | None) -> None:
    """One line a stage on stderr, with its seconds when it has ended."""
    from pumice.report_table import clean

    if seconds is None:
        print(f"  {clean(stage)} ...", end="", file=sys.stderr, flush=True)
    else:
        print(" failed" if math.isnan(seconds) else f" {seconds:.1f} s", file=sys.stderr)
