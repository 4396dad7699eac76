"""``pumice advise``: which technique, which pattern, how much, in which layer; the recipe for ``compile --recipe``."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pumice.commands.common import (
    Commands,
    add_command,
    add_input_shapes,
    parse_shapes,
    positive,
    refuse_to_overwrite,
    script_of,
    show_progress,
    terminal_width,
)
from pumice.errors import UsageError

if TYPE_CHECKING:
    from pumice.advisor.advice import Advice
    from pumice.advisor.budget import Budget
    from pumice.advisor.subjects import Space


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "advise",
        "find what to prune, how and where, for a budget of time, bytes or accuracy",
        "pumice advise model.onnx --calibration images.npz --eval metric.py:accuracy --latency 8ms -o recipe.toml",
    )
    parser.add_argument("model", metavar="MODEL", help="an .onnx or .pt2 file")
    add_input_shapes(parser)
    parser.add_argument(
        "--calibration", required=True, metavar="FILE.npz", help="samples, one array an input; a quarter is held out"
    )
    parser.add_argument(
        "--eval",
        metavar="SCRIPT.py:FUNCTION",
        help="run this function of yours, which gets an engine, run(feed) -> outputs, and returns a number, or a dict "
        "of numbers: higher is better (default: the cosine of the outputs with the float model's)",
    )
    parser.add_argument("--target", default="native", metavar="NAME", help="as for compile (default: native)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--latency", metavar="T", help="8ms, 800us, or 60%% of what dense int8 takes")
    budget.add_argument("--size", metavar="S", help="2MB, 300kB, or 40%% of what dense int8 takes")
    budget.add_argument(
        "--max-drop", metavar="D", help="1%% of the float model's metric, or 0.01 in the metric's own unit"
    )
    parser.add_argument("-o", "--output", metavar="recipe.toml", help="the recipe to write, for `compile --recipe`")
    parser.add_argument("--advice", metavar="FILE.json", help="all that was found, for `report --advice`")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (with `pip install matplotlib`)")
    _add_search_options(parser)
    parser.add_argument("--all-options", action="store_true", help="print every option of every layer")
    parser.add_argument("--json", action="store_true", help="print what --advice writes, in place of the tables")


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="FILE.toml", help="a recipe to start from, which prunes nothing itself")
    parser.add_argument("--techniques", metavar="A,B", help="default: magnitude,wanda,sparsegpt; obc is slower")
    parser.add_argument(
        "--patterns", metavar="A,B", help="to try (default: 1x4,2x4,4x4,unstructured; for GPUs 2:4 too)"
    )
    parser.add_argument("--levels", metavar="A,B", help="shares of zeros to try (default: 0.3 to 0.95)")
    parser.add_argument(
        "--removals",
        metavar="A,B",
        help="filters and heads to take out first, while that pays (default: filters:0.125 to filters:0.5, heads:0.25, "
        "heads:0.5), or none",
    )
    parser.add_argument("--tuning-db", metavar="FILE", help="times of kernels, as `pumice tune` writes them")
    parser.add_argument("--measure", action="store_true", help="measure the kernels' times here, into --tuning-db")
    parser.add_argument("--threads", type=int, metavar="N", help="what the library runs on by default")
    parser.add_argument("--trials", type=int, default=40, metavar="N", help="choices to score (default: 40)")
    parser.add_argument("--minutes", type=positive, metavar="M", help="of finding sensitivities, at most")
    parser.add_argument("--points", type=int, default=5, metavar="N", help="of the frontier (default: 5)")
    parser.add_argument("--seconds", type=positive, default=0.2, metavar="S", help="of timing a kernel (default: 0.2)")
    parser.add_argument("--work", metavar="FILE", help="what a killed run goes on from (default: beside the output)")


def run(args: argparse.Namespace) -> None:
    """Advise, print, write."""
    from pumice.advise import Effort, advise_model
    from pumice.advisor.plot import check_matplotlib, plot
    from pumice.advisor.text import format_advice
    from pumice.evaluation import load_metric
    from pumice.recipe import recipe_of
    from pumice.threads import allowed_cpus

    budget = _budget(args)
    if args.output and budget is None:
        raise UsageError("-o: without a budget no recipe is chosen; give --latency, --size or --max-drop")
    _check_outputs(args)
    if args.plot:
        check_matplotlib()
    work = args.work or (f"{args.output or args.advice}.work" if args.output or args.advice else None)
    shown = _Progress()
    try:
        advice = advise_model(
            args.model,
            calibration=args.calibration,
            inputs=parse_shapes(args.input) or None,
            metric=load_metric(args.eval) if args.eval else None,
            target=args.target,
            budget=budget,
            base=recipe_of(args.recipe),
            space=_space(args),
            effort=Effort(args.trials, args.minutes, args.points, args.seconds, min(2, len(allowed_cpus()))),
            tuning_db=args.tuning_db,
            measure=args.measure,
            threads=args.threads,
            work_file=work,
            progress=shown.stage,
            tell=shown.tell,
        )
    except KeyboardInterrupt:
        kept = f"; {work} keeps what was found, and the same command goes on from there" if work else ""
        raise KeyboardInterrupt(f"interrupted{kept}") from None
    text = json.dumps(advice.to_json(), indent=2, allow_nan=False)
    if args.advice:
        _write(args.advice, text + "\n")
    if args.plot:
        plot(advice, Path(args.plot))
    print(text if args.json else format_advice(advice, terminal_width(), args.all_options))
    if args.output:
        _write_recipe(args, advice)


def _budget(args: argparse.Namespace) -> Budget | None:
    from pumice.advisor.budget import Budget

    for kind, text in (("latency", args.latency), ("size", args.size), ("max-drop", args.max_drop)):
        if text is not None:
            return Budget.parse(kind, text)
    return None


def _space(args: argparse.Namespace) -> Space:
    """What is tried. Raises UsageError for a technique, pattern or level that is none."""
    from pumice.advisor.subjects import Space
    from pumice.targets.target import Target

    given = {
        "techniques": tuple(args.techniques.split(",")) if args.techniques else None,
        "patterns": tuple(args.patterns.split(",")) if args.patterns else None,
        "levels": tuple(map(_share, args.levels.split(","))) if args.levels else None,
        "removals": _removals(args.removals),
    }
    return Space.of(Target.parse(args.target), **{name: value for name, value in given.items() if value is not None})


def _removals(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    # Commas are also what parts the layers of ``keep=`` and ``only=``.
    return () if text == "none" else tuple(re.split(r",(?=\w+:[\d.])", text))


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UsageError(f"--levels {text}: is no share of zeros between 0 and 1, such as 0.5")
    return value


def _check_outputs(args: argparse.Namespace) -> None:
    """Raise UsageError where a file could not be written, or is one that is read: before the work, not after."""
    from pumice.files import check_destination

    for output in filter(None, (args.output, args.advice, args.plot)):
        check_destination(output)
        refuse_to_overwrite(output, args.model, args.calibration, script_of(args.eval), args.recipe, args.tuning_db)


def _write_recipe(args: argparse.Namespace, advice: Advice) -> None:
    from pumice.advisor.ledger import describe
    from pumice.recipe import format_recipe

    point = advice.chosen
    assert point is not None
    comment = f"by `pumice advise` for {advice.source} on {advice.target}, within {advice.budget}\n{describe(point)}"
    _write(args.output, format_recipe(point.recipe, comment))
    words = ["pumice", "compile", args.model, "--recipe", args.output, "--calibration", args.calibration]
    for name in ("target", "tuning_db", "threads"):
        value = getattr(args, name)
        words += [] if value in (None, "native") else [f"--{name.replace('_', '-')}", str(value)]
    words += [word for shape in args.input or () for word in ("--input", shape)]
    where = sys.stderr if args.json else sys.stdout  # what --json prints is JSON alone
    print(f"\n{args.output}: `{shlex.join([*words, '-o', 'model.so'])}` uses it", file=where)


def _write(path: str, text: str) -> None:
    """Whole or not at all."""
    import tempfile

    from pumice.files import move_into_place

    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        move_into_place(Path(file.name), Path(path))


class _Progress:
    """Stages on stderr with what each found below it."""

    def __init__(self) -> None:
        self._stage = ""

    def stage(self, name: str, seconds: float | None) -> None:
        """A stage begins, or has ended."""
        if seconds is not None and not self._stage:  # others were told of between
            print(f"  {name} ...", end="", file=sys.stderr)
        self._stage = name if seconds is None else ""
        show_progress(name, seconds)

    def tell(self, text: str) -> None:
        """A line below the stage."""
        from pumice.report_table import clean

        if self._stage:
            print(file=sys.stderr)
        self._stage = ""
        print(f"    {clean(text)}", file=sys.stderr, flush=True)
