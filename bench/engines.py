"""The engines that the model benchmarks compare, all made from one network and one ONNX file, and their table."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pumice
from pumice.bench import measure
from pumice.peers import OnnxRuntime, quantize_int8

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], np.ndarray]

ENGINES = ("torch", "onnxruntime", "onnxruntime-int8", "pumice", "pumice-int8", "pumice-sparse")
PRUNED = "magnitude:1x4:0.9"


@dataclass
class Engine:
    """One line of a benchmark's table. ``run`` takes arrays by input name and gives the first output."""

    name: str
    run: Run
    metrics: dict[str, float] = field(default_factory=dict)
    milliseconds: float | None = None  # median of one inference
    megabytes: float | None = None
    compile_seconds: float | None = None

    def run_all(self, feed: Feed) -> np.ndarray:
        """The outputs of all samples, one inference each, joined along the first axis."""
        return np.concatenate([self.run(sample) for sample in samples_of(feed)])


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloaded packages (bench/README.md)")
    parser.add_argument("--work", type=Path, help="folder for exported and compiled models (default: DATA/work)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=ENGINES, metavar="ENGINE", help=f"of {', '.join(ENGINES)}"
    )
    parser.add_argument("--target", default="native", help="what Pumice compiles for")
    parser.add_argument("--method", help="how Pumice calibrates (default: as `pumice compile`)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="how long all engines together are timed")
    parser.add_argument("--json", type=Path, help="write the table here too")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed command line, with the work folder made and torch held to the same threads as the engines."""
    options = parser.parse_args()
    options.work = options.work or options.data / "work"
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    return options


def export(network: torch.nn.Module, sample: Feed, path: Path) -> Path:
    """``network`` as an ONNX file with the input names and shapes of ``sample``."""
    torch.onnx.export(
        network.eval(),
        tuple(torch.from_numpy(array) for array in sample.values()),
        path,
        input_names=list(sample),
        output_names=["output"],
        external_data=False,
        verbose=False,
    )
    return path


def prepare(
    name: str,
    network: torch.nn.Module,
    path: Path,
    calibration: Feed,
    options: argparse.Namespace,
    onnxruntime_quantizes: Sequence[str] | None = None,
    keep_float: Sequence[str] = (),
) -> Engine:
    """The engine of that name in ``ENGINES`` for ``network`` and its ONNX file.

    ``onnxruntime_quantizes``: the operators that ONNX Runtime's quantizer is to treat; all that it can, if None.
    ``keep_float``: the layers that Pumice leaves in float.
    """
    int8 = {"calibration": dict(calibration), "keep_float": tuple(keep_float)}
    match name:
        case "torch":
            return torch_engine(network)
        case "onnxruntime":
            return _onnxruntime("f32", path.read_bytes(), options.threads)
        case "onnxruntime-int8":
            quantized = quantize_int8(path.read_bytes(), calibration, onnxruntime_quantizes)
            return _onnxruntime("int8", quantized, options.threads)
        case "pumice":
            return _pumice("f32", path, options, quantize=False)
        case "pumice-int8":
            return _pumice("int8", path, options, **int8)
        case _:
            return _pumice("int8, 90 % zero", path, options, prune=PRUNED, **int8)


def torch_engine(network: torch.nn.Module) -> Engine:
    """The network itself, in float."""

    def run(feed: Feed) -> np.ndarray:
        with torch.inference_mode():
            result: np.ndarray = network(*(torch.from_numpy(array) for array in feed.values())).numpy()
        return result

    return Engine("torch f32", run)


def _onnxruntime(kind: str, model: bytes, threads: int) -> Engine:
    session = OnnxRuntime(model, threads)
    return Engine(f"ONNX Runtime {kind}", lambda feed: _first(session.run(feed)), megabytes=len(model) / 1e6)


def _pumice(kind: str, path: Path, options: argparse.Namespace, **how: Any) -> Engine:
    library = path.with_suffix("." + re.sub("[^0-9a-z]+", "-", kind) + ".so")
    if options.method:
        how["calibration_method"] = options.method
    started = time.perf_counter()
    artifact = pumice.compile(path, target=options.target, threads=options.threads, **how)
    seconds = time.perf_counter() - started
    artifact.save(library)
    model = pumice.load(library, threads=options.threads)
    megabytes = library.stat().st_size / 1e6
    return Engine(f"Pumice {kind}", lambda feed: _first(model(feed)), megabytes=megabytes, compile_seconds=seconds)


def _first(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return next(iter(outputs.values()))


def samples_of(feed: Feed) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one, cut along the first axis of every array."""
    for index in range(len(next(iter(feed.values())))):
        yield {name: array[index : index + 1] for name, array in feed.items()}


def time_together(engines: Sequence[Engine], sample: Feed, seconds: float) -> None:
    """Set every engine's median time for one sample; they take turns for ``seconds`` in all."""

    def call(engine: Engine) -> Callable[[], np.ndarray]:
        return lambda: engine.run(sample)

    timings = measure({engine.name: call(engine) for engine in engines}, seconds)
    for engine, timing in zip(engines, timings, strict=True):
        engine.milliseconds = timing.median


def report(engines: Sequence[Engine], options: argparse.Namespace, **facts: object) -> None:
    """Print the table, and write it with ``facts`` as JSON where that is asked for."""
    print(table(engines))
    if options.json:
        rows = [{name: value for name, value in vars(engine).items() if name != "run"} for engine in engines]
        options.json.write_text(json.dumps({**facts, "threads": options.threads, "engines": rows}, indent=1) + "\n")


def table(engines: Sequence[Engine]) -> str:
    """The results as a Markdown table."""
    metrics = list(dict.fromkeys(name for engine in engines for name in engine.metrics))
    lines = [["engine", *metrics, "ms", "MB", "compile s"]]
    for engine in engines:
        measured = [_number(engine.metrics.get(name), 4) for name in metrics]
        costs = [(engine.milliseconds, 2), (engine.megabytes, 1), (engine.compile_seconds, 1)]
        lines.append([engine.name, *measured, *(_number(value, digits) for value, digits in costs)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
