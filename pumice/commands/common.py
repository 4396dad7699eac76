"""What several sub-commands share: help with an example, shapes on the command line, the terminal's width."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pumice.errors import UsageError

Commands = Any  # argparse's sub-parsers action, whose type is private


def add_command(commands: Commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A sub-command whose ``-h`` ends with an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_model_options(parser: argparse.ArgumentParser, calibration: str) -> None:
    """The model, and what makes another network of it: shapes, zeros, int8; ``calibration`` is the help on its data."""
    parser.add_argument("model", metavar="MODEL", help="an .onnx or .pt2 file")
    add_input_shapes(parser)
    parser.add_argument("--calibration", metavar="FILE.npz", help=calibration)
    parser.add_argument("--recipe", metavar="FILE.toml", help="what `pumice advise` wrote; other options go before it")
    parser.add_argument(
        "--prune",
        action="append",
        metavar="SPEC",
        help="prune first, as in magnitude:1x4:0.9, sparsegpt:2:4 or filters:0.3 (repeatable; docs/pruning.md)",
    )
    parser.add_argument("--masks", metavar="FILE", help=".safetensors or .npz of 0/1 arrays by weight name")
    parser.add_argument("--keep-float", action="append", metavar="GLOB", help="layers that stay float32 (repeatable)")
    parser.add_argument("--no-quantize", action="store_true", help="compile in float32")
    parser.add_argument("--threads", type=int, metavar="N", help="what the library runs on by default")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """``add_model_options`` as keyword arguments."""
    return {
        "inputs": parse_shapes(args.input) or None,
        "calibration": args.calibration,
        "recipe": args.recipe,
        "prune": args.prune,
        "masks": args.masks,
        "keep_float": args.keep_float,
        "quantize": False if args.no_quantize else None,
        "threads": args.threads,
    }


def add_input_shapes(parser: argparse.ArgumentParser) -> None:
    """``--input NAME=1x3x224x224``, any number of times."""
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=SHAPE",
        help="the shape of an input whose batch or length is open, as in image=1x3x224x224 (repeatable)",
    )


def parse_shapes(options: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``["image=1x3x224x224"]`` -> ``{"image": (1, 3, 224, 224)}``; a name may hold ``=``, ``:`` and ``/``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for option in options:
        name, _, text = option.rpartition("=")
        sizes = text.lower().split("x")
        if not name or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise UsageError(f"--input {option}: give NAME=SHAPE with sizes of at least 1, such as image=1x3x224x224")
        if name in shapes:
            raise UsageError(f"--input {option}: the shape of '{name}' is given twice")
        shapes[name] = tuple(int(size) for size in sizes)
    return shapes


def refuse_to_overwrite(output: str | Path, *sources: str | Path | None, option: str = "-o") -> None:
    """Raise UsageError where ``option``, which gives ``output``, names a file that the command reads."""
    for source in sources:
        if source and Path(output).exists() and Path(source).exists() and Path(output).samefile(source):
            raise UsageError(f"{option} {output}: is {source} itself, which would be lost; give another name")


def script_of(metric: str | None) -> str | None:
    """The script of ``SCRIPT.py:FUNCTION``, which no output may be written over."""
    return metric.rpartition(":")[0] if metric else None


def show_progress(stage: str, seconds: float | None) -> None:
    """One line a stage on stderr, with its seconds when it has ended."""
    from pumice.report_table import clean

    if seconds is None:
        print(f"  {clean(stage)} ...", end="", file=sys.stderr, flush=True)
    else:
        print(" failed" if math.isnan(seconds) else f" {seconds:.1f} s", file=sys.stderr)


def positive(text: str) -> float:
    """A number above zero, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def terminal_width() -> int:
    """Columns to fill: of the terminal, at least 120; 160 where there is none."""
    return max(120, shutil.get_terminal_size((160, 24)).columns)
