"""``pumice bench``: how long one inference takes, alone or against other engines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pumice.commands.common import Commands, add_command, positive
from pumice.errors import UsageError


def add_parser(commands: Commands) -> None:
    """Declare the sub-command."""
    parser = add_command(
        commands,
        "bench",
        "time a compiled library, alone or in turns with ONNX Runtime and OpenVINO, where it runs: on the CPU or a GPU",
        "pumice bench model.so --vs onnxruntime --model model.onnx --calibration images.npz --threads 2",
    )
    parser.add_argument("library", metavar="OUT.so", help="a library that `pumice compile` wrote")
    parser.add_argument(
        "--vs", action="append", choices=["onnxruntime", "openvino"], default=[], help="an engine to compare with"
    )
    parser.add_argument("--model", metavar="MODEL.onnx", help="the model that the library was compiled from")
    parser.add_argument("--calibration", metavar="FILE.npz", help="what the other engines' int8 is calibrated with")
    parser.add_argument("-i", "--inputs", metavar="IN.npz", help="what to run (default: random floats, integers of 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="for every engine (default: one for each core)")
    parser.add_argument("--seconds", type=positive, default=5.0, metavar="S", help="how long to measure (default: 5)")
    parser.add_argument("--layers", action="store_true", help="also time each layer and what runs between them")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON")


def run(args: argparse.Namespace) -> None:
    """Warm up, measure in turns, print medians, spread and ratios."""
    from pumice.arrays import read_arrays
    from pumice.artifact import load
    from pumice.bench import measure

    if args.vs and not args.model:
        raise UsageError(f"--vs {args.vs[0]}: give the model that the library was compiled from, as --model MODEL.onnx")
    model = load(args.library, args.threads)
    feed = read_arrays(args.inputs) if args.inputs else random_inputs(model)
    model(feed)
    on_gpu = bool(model.manifest["target"].get("gpus"))
    engines: dict[str, Callable[[], Any]] = {"pumice": lambda: model(feed)}
    notes: list[str] = []
    if args.vs:
        engines |= _peers(args, model, feed, on_gpu, notes)
    timings = measure(engines, args.seconds)
    profile = model.profile(feed, args.seconds) if args.layers else None
    if args.json:
        entries = [timing.to_json() for timing in timings]
        numbers = {"library": args.library, "threads": model.threads, "engines": entries, "notes": notes}
        print(json.dumps(numbers | ({"layers": profile.to_json()} if profile else {})))
        return
    print(format_timings(timings, "the GPU" if on_gpu else f"{model.threads} thread{'s' * (model.threads > 1)}"))
    print("".join(f"note: {note}\n" for note in notes), end="")
    if profile:
        print(f"\n{profile}")


def format_timings(timings: list[Any], place: str) -> str:
    """The table, for a person; ``place`` is what all engines ran on."""
    from pumice.report_table import format_table

    rows = [("engine", "median ms", "p10 ms", "p90 ms", "calls", f"time ratio to {timings[0].name}")]
    for t in timings:
        rows.append((t.name, f"{t.median:.4g}", f"{t.p10:.4g}", f"{t.p90:.4g}", str(t.calls), f"{t.ratio:.2f}"))
    head = f"one inference on {place}, engines in turns:"
    return "\n".join([head, "", *format_table(rows, 120, {"engine"})])


def random_inputs(model: Any) -> dict[str, np.ndarray]:
    """Inputs that any model takes: uniform floats in 0..1; ones for integers, which may be indices."""
    draw = np.random.default_rng(0)
    return {
        spec.name: draw.random(spec.shape).astype(spec.dtype)
        if np.dtype(spec.dtype).kind == "f"
        else np.ones(spec.shape, spec.dtype)
        for spec in model.inputs
    }


def _peers(
    args: argparse.Namespace, model: Any, feed: dict[str, np.ndarray], on_gpu: bool, notes: list[str]
) -> dict[str, Callable[[], Any]]:
    from pumice.arrays import read_arrays
    from pumice.peers import PEERS, is_quantized, quantize_int8, read_pinned

    calls: dict[str, Callable[[], Any]] = {}

    def add(kind: str, content: bytes) -> None:
        for name in dict.fromkeys(args.vs):
            peer = PEERS[name](content, model.threads, on_gpu)
            calls[f"{peer.title} {kind}"] = partial(peer.run, feed)

    source = read_pinned(args.model, {spec.name: spec.shape for spec in model.inputs})
    add("int8 (as given)" if is_quantized(source) else "f32", source)
    if not is_quantized(source) and args.calibration:
        add("int8", quantize_int8(source, read_arrays(args.calibration), on_gpu=on_gpu))
    elif not is_quantized(source):
        notes.append("int8 of the other engines was left out; it needs --calibration FILE.npz")
    return calls
