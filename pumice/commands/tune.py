"""``pumice tune``: the times of a model's kernels on this machine, for ``pumice compile --tuning-db``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pumice.commands.common import (
    Commands,
    add_command,
    add_model_options,
    model_options,
    positive,
    refuse_to_overwrite,
    show_progress,
)
from pumice.errors import UnsupportedError

if TYPE_CHECKING:
    from pumice.tune import Tuned


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "tune",
        "measure the kernels of a model's layers on this machine, for `compile --tuning-db`",
        "pumice tune model.onnx -o tuning.jsonl --input image=1x3x224x224 --prune magnitude:1x4:0.9",
    )
    add_model_options(parser, "samples; may be left out: times do not depend on scales, and random samples will do")
    parser.add_argument(
        "-o",
        "--output",
        default="tuning.jsonl",
        metavar="FILE",
        help="the database; one that is there is added to, and what it has is not measured again "
        "(default: tuning.jsonl)",
    )
    parser.add_argument("--device", default="native", metavar="NAME", help="where to measure: native, this machine")
    parser.add_argument(
        "--seconds-per-kernel", type=positive, default=0.2, metavar="S", help="of measuring (default: 0.2)"
    )


def run(args: argparse.Namespace) -> None:
    """Measure, a line a layer."""
    from pumice.tune import tune_model

    if args.device != "native":
        raise UnsupportedError(f"--device {args.device}: kernels are measured on this machine only: give native")
    refuse_to_overwrite(args.output, args.model, args.calibration, args.masks, args.recipe)
    try:
        found = tune_model(
            args.model,
            args.output,
            seconds=args.seconds_per_kernel,
            progress=show_progress,
            tell=lambda tuned: print(format_tuned(tuned), flush=True),
            **model_options(args),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {args.output} keeps the layers that are done, and the same command goes on from there"
        ) from None
    new = sum(tuned.is_new for tuned in found)
    print(
        f"{args.output}: {new} of {len(found)} layers measured now; `pumice compile --tuning-db {args.output}` uses it"
    )


def format_tuned(tuned: Tuned) -> str:
    """``3/20 conv2 (and 2 alike): 14 kernels, sparse 1x4 0.14 ms (8 vectors, 64 words, 64 rows), dense 0.72 ms``."""
    from pumice.report_table import clean
    from pumice.schedules.measurements import format_time

    form, tiling = tuned.best
    name = clean(tuned.layers[0]) + (f" (and {len(tuned.layers) - 1} alike)" if len(tuned.layers) > 1 else "")
    fastest = tuned.times[tuned.best]
    how = f" ({tiling.vectors} vectors, {tiling.words} words, {tiling.rows} rows)" if tiling else ""
    text = f"{tuned.number}/{tuned.count} {name}: {len(tuned.times)} kernels, "
    text += f"{form.describe(tuned.depth)} {format_time(fastest)}{how}"
    if not form.is_dense:
        text += f", dense {format_time(tuned.dense)}, {tuned.dense / fastest:.1f} times as fast"
    return f"{text}, {_left(tuned)}"


def _left(tuned: Tuned) -> str:
    if not tuned.is_new:
        return "known"
    if tuned.seconds_left < 60:
        return f"about {tuned.seconds_left:.0f} s left"
    return f"about {tuned.seconds_left / 60:.0f} min left"
