"""``pumice report``: one web page that says what compiling gained and lost, where, and why."""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pumice.commands.common import Commands, add_command, positive, refuse_to_overwrite, script_of, show_progress
from pumice.errors import UsageError


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "report",
        "write a web page on a compiled library: accuracy, time, size, each layer and why it is as it is",
        "pumice report model.so -o report.html --model model.onnx --eval metric.py:accuracy",
    )
    parser.add_argument("library", metavar="OUT.so", help="a library that `pumice compile` wrote")
    parser.add_argument("-o", "--output", metavar="FILE.html", help="the page to write: one file that loads no other")
    parser.add_argument("--model", metavar="MODEL.onnx", help="the original, to measure beside it in ONNX Runtime")
    parser.add_argument(
        "--eval",
        metavar="SCRIPT.py:FUNCTION",
        help="run this function of yours, which gets an engine, run(feed) -> outputs, and returns a number, or a dict "
        "of numbers: higher is better",
    )
    parser.add_argument("--advice", metavar="FILE.json", help="what `pumice advise` wrote: its points are drawn")
    parser.add_argument("-i", "--inputs", metavar="IN.npz", help="what to time (default: random floats, integers of 1)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of every engine (default: as compiled, else all cores)"
    )
    parser.add_argument("--seconds", type=positive, default=5.0, metavar="S", help="of each timing (default: 5)")
    parser.add_argument("--no-time", action="store_true", help="time nothing; without --eval, nothing is executed")
    parser.add_argument("--json", action="store_true", help="print the page's data as JSON; -o is then optional")


def run(args: argparse.Namespace) -> None:
    """Measure, write the page whole or not at all, say where it is."""
    from pumice.evaluation import load_metric
    from pumice.files import check_destination, move_into_place
    from pumice.report import Request, format_page, make_report
    from pumice.report_table import clean, format_bytes

    if not args.output and not args.json:
        raise UsageError("there is nowhere to write the report to: give -o report.html, or --json to print its data")
    if args.output:
        check_destination(args.output)
        refuse_to_overwrite(args.output, args.library, args.model, script_of(args.eval), args.advice, args.inputs)
    request = Request(
        model=Path(args.model) if args.model else None,
        metric=load_metric(args.eval) if args.eval else None,
        advice=Path(args.advice) if args.advice else None,
        feed=None if args.no_time else lambda model: _feed(args, model),
        threads=args.threads,
        seconds=args.seconds,
    )
    report = make_report(args.library, request, show_progress)
    if args.output:
        with tempfile.TemporaryDirectory(prefix="pumice-") as folder:
            page = Path(folder, "report.html")
            page.write_text(format_page(report, _command(args)), "utf-8")
            size = page.stat().st_size
            move_into_place(page, Path(args.output))
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print(f"report: {clean(args.output)}, {format_bytes(size)}")


def _feed(args: argparse.Namespace, model: Any) -> Mapping[str, Any]:
    from pumice.arrays import read_arrays
    from pumice.commands.bench import random_inputs

    return read_arrays(args.inputs) if args.inputs else random_inputs(model)


def _command(args: argparse.Namespace) -> str:
    """The command line, for the page: what was typed, in one order."""
    words = ["pumice", "report", args.library]
    for name in ("output", "model", "eval", "advice", "inputs", "threads"):
        value = getattr(args, name)
        words += [] if value is None else ["-o" if name == "output" else f"--{name}", str(value)]
    words += ["--no-time"] if args.no_time else ["--seconds", f"{args.seconds:g}"]
    return shlex.join(words)
