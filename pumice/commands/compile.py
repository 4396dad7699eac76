"""``pumice compile``: a model file to a library, with the table of what became of each layer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pumice.commands.common import (
    Commands,
    add_command,
    add_model_options,
    model_options,
    refuse_to_overwrite,
    script_of,
    show_progress,
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
    add_model_options(parser, "samples, one array an input: int8 needs them")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.so", help="the library to write")
    parser.add_argument(
        "--target",
        default="native",
        metavar="NAME",
        help="native (this machine), x86-64-v4-vnni, armv8.2-a+dotprod, raspberry-pi-5, ...: `pumice targets` lists "
        "them; or a TVM target as JSON",
    )
    libc = parser.add_mutually_exclusive_group()
    libc.add_argument(
        "--glibc",
        dest="libc",
        type="glibc-{}".format,
        metavar="VERSION",
        help="link for a box with this glibc or a newer one, as in 2.28 (with `pip install ziglang`; default: the "
        "glibc of this system's compiler)",
    )
    libc.add_argument("--musl", dest="libc", action="store_const", const="musl", help="link for a box with musl")
    parser.add_argument(
        "--calibration-method",
        metavar="METHOD",
        help="how a range is chosen: minmax (default), percentile, entropy or mse",
    )
    parser.add_argument(
        "--permute", action="store_true", default=None, help="order channels so that what is pruned lies together"
    )
    parser.add_argument(
        "--reconstruct",
        type=int,
        metavar="STEPS",
        help="train each block of the pruned network towards what the dense one gives on the calibration data (needs "
        "`pip install 'pumice[torch]'`)",
    )
    parser.add_argument(
        "--reconstruct-whole",
        action="store_true",
        default=None,
        help="and then as many steps of the network as a whole",
    )
    parser.add_argument(
        "--smooth",
        type=_strength,
        metavar="STRENGTH",
        help="let weights take over what is uneven in transformers' activations (SmoothQuant): 0 to 1, 0.5 is usual, "
        "or search, one for each tensor",
    )
    parser.add_argument(
        "--float-budget",
        type=_share,
        metavar="SHARE",
        help="leave layers float where int8 does the most harm, up to this share of the multiply-adds: 0.05, or 5%%",
    )
    parser.add_argument(
        "--rounding",
        metavar="HOW",
        help="nearest (default), or gptq: weights make up for each other's rounding errors on the calibration data",
    )
    parser.add_argument("--no-equalize", action="store_true", help="do not scale channels to one range before")
    parser.add_argument("--no-correct-bias", action="store_true", help="do not take mean rounding errors out of biases")
    parser.add_argument("--no-layer-errors", action="store_true", help="do not measure the SNR of each layer: quicker")
    parser.add_argument(
        "--no-check", action="store_true", help="store nothing for `pumice verify`: no sample of the calibration data"
    )
    parser.add_argument("--tuning-db", metavar="FILE", help="choose kernels by the times that `pumice tune` measured")
    parser.add_argument(
        "--emit-onnx", metavar="FILE.onnx", help="also write the pruned, quantized model as ONNX, for other runtimes"
    )
    parser.add_argument(
        "--eval",
        metavar="SCRIPT.py:FUNCTION",
        help="measure by this function of yours, which gets an engine, run(feed) -> outputs, and returns a number, or "
        "a dict of numbers: of the model before and after, for the report",
    )
    parser.add_argument("--json", action="store_true", help="the manifest as JSON instead of the table")


def run(args: argparse.Namespace) -> None:
    """Compile, write, report."""
    from pumice.driver import compile_model
    from pumice.errors import UsageError
    from pumice.evaluation import load_metric
    from pumice.files import check_destination
    from pumice.report_table import clean, format_bytes

    output = Path(args.output)
    check_destination(output)
    sources = (args.model, args.calibration, args.masks, args.tuning_db, args.recipe, script_of(args.eval))
    refuse_to_overwrite(output, *sources)
    if args.emit_onnx:
        check_destination(args.emit_onnx)
        refuse_to_overwrite(args.emit_onnx, *sources, option="--emit-onnx")
        if Path(args.emit_onnx).resolve() == output.resolve():
            raise UsageError(f"--emit-onnx {args.emit_onnx}: is the file of -o too; give another name")
    artifact = compile_model(
        args.model,
        target=args.target,
        calibration_method=args.calibration_method,
        permute=args.permute,
        reconstruct=args.reconstruct,
        reconstruct_whole=args.reconstruct_whole,
        smooth=args.smooth,
        float_budget=args.float_budget,
        rounding=args.rounding,
        equalize=False if args.no_equalize else None,
        correct_bias=False if args.no_correct_bias else None,
        measure_errors=not args.no_layer_errors,
        tuning_db=args.tuning_db,
        libc=args.libc,
        check=not args.no_check,
        emit_onnx=args.emit_onnx,
        metric=load_metric(args.eval) if args.eval else None,
        progress=show_progress,
        **model_options(args),
    )
    artifact.save(output)
    size = output.stat().st_size
    if args.json:
        print(json.dumps({**artifact.manifest, "library": {"file": str(output), "bytes": size}}, indent=2))
        return
    print(artifact.report(terminal_width()))
    print(f"library: {clean(str(output))}, {format_bytes(size)}")


def _strength(text: str) -> float | str:
    return text if text == "search" else float(text)


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
