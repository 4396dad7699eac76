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
from bench.tables import markdown, number
from pumice.bench import Timing, measure
from pumice.errors import UsageError
from pumice.peers import PEERS, quantize_int8
from pumice.targets.target import Target

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], np.ndarray]

ENGINES = (
    "torch",
    *(name for peer in PEERS for name in (peer, f"{peer}-int8")),
    "pumice",
    "pumice-int8",
    "pumice-sparse",
)
PRUNED = "magnitude:1x4:0.9"


@dataclass
class Engine:
    """One line of a benchmark's table. ``run`` takes arrays by input name and gives the first output."""

    name: str
    run: Run
    metrics: dict[str, float] = field(default_factory=dict)
    timing: Timing | None = None  # of one inference
    megabytes: float | None = None
    compile_seconds: float | None = None

    def run_all(self, feed: Feed) -> np.ndarray:
        """The outputs of all samples, one inference each, joined along the first axis."""
        return np.concatenate([self.run(sample) for sample in samples_of(feed)])

    def to_json(self) -> dict[str, Any]:
        """What is known of it, for a file."""
        known = {
            "name": self.name,
            **self.metrics,
            "megabytes": self.megabytes,
            "compile_seconds": self.compile_seconds,
        }
        return known | (self.timing.to_json() if self.timing else {}) | {"name": self.name}


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
    quantized_operators: Sequence[str] | None = None,
    float_budget: float = 0.0,
) -> Engine:
    """The engine of that name in ``ENGINES`` for ``network`` and its ONNX file.

    ``quantized_operators``: those that ONNX Runtime's quantizer, which makes the int8 model of the other engines, is to
    treat; all that it can, if None. ``float_budget``: what share Pumice may leave in float.
    """
    peer, _, int8 = name.partition("-")
    on_gpu = Target.parse(options.target).runs_on_gpu
    if peer in PEERS:
        content = path.read_bytes()
        quantized = quantize_int8(content, calibration, quantized_operators, on_gpu) if int8 else content
        return peer_engine(peer, quantized, "int8" if int8 else "f32", options.threads, on_gpu)
    if name == "torch":
        if on_gpu:
            raise UsageError(f"--target {options.target}: PyTorch runs on the CPU here; leave it out of --engines")
        return torch_engine(network)
    how = {"calibration_method": options.method} if options.method else {}
    if name == "pumice":
        return pumice_engine(path, "f32", options.target, options.threads, quantize=False, **how)
    how |= {"calibration": dict(calibration), "float_budget": float_budget}
    if name == "pumice-sparse":
        return pumice_engine(path, "int8, 90 % zero", options.target, options.threads, prune=PRUNED, **how)
    return pumice_engine(path, "int8", options.target, options.threads, **how)


def torch_engine(network: torch.nn.Module) -> Engine:
    """The network itself, in float."""

    def run(feed: Feed) -> np.ndarray:
        with torch.inference_mode():
            result: np.ndarray = network(*(torch.from_numpy(array) for array in feed.values())).numpy()
        return result

    return Engine("torch f32", run)


def peer_engine(peer: str, model: bytes, kind: str, threads: int, on_gpu: bool) -> Engine:
    """An ONNX model on the engine of that name in ``PEERS``; ``kind`` says in the table what the model is."""
    session = PEERS[peer](model, threads, on_gpu)
    return Engine(f"{session.title} {kind}", lambda feed: _first(session.run(feed)), megabytes=len(model) / 1e6)


def pumice_engine(path: Path, kind: str, target: str, threads: int, **how: Any) -> Engine:
    """An ONNX file compiled by ``pumice.compile`` with the options ``how``; the library is written beside it."""
    library = path.with_suffix("." + re.sub("[^0-9a-z]+", "-", kind) + ".so")
    started = time.perf_counter()
    artifact = pumice.compile(path, target=target, threads=threads, **how)
    seconds = time.perf_counter() - started
    artifact.save(library)
    model = pumice.load(library, threads=threads)
    megabytes = library.stat().st_size / 1e6
    return Engine(f"Pumice {kind}", lambda feed: _first(model(feed)), megabytes=megabytes, compile_seconds=seconds)


def _first(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return next(iter(outputs.values()))


def samples_of(feed: Feed) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one, cut along the first axis of every array."""
    for index in range(len(next(iter(feed.values())))):
        yield {name: array[index : index + 1] for name, array in feed.items()}


def time_together(engines: Sequence[Engine], sample: Feed, seconds: float) -> None:
    """Set every engine's time for one sample; they take turns for ``seconds`` in all."""

    def call(engine: Engine) -> Callable[[], np.ndarray]:
        return lambda: engine.run(sample)

    timings = measure({engine.name: call(engine) for engine in engines}, seconds)
    for engine, timing in zip(engines, timings, strict=True):
        engine.timing = timing


def report(engines: Sequence[Engine], options: argparse.Namespace, **facts: object) -> None:
    """Print the table, and write it with ``facts`` as JSON where that is asked for."""
    print(table(engines))
    if options.json:
        rows = [engine.to_json() for engine in engines]
        options.json.write_text(json.dumps({**facts, "threads": options.threads, "engines": rows}, indent=1) + "\n")


def table(engines: Sequence[Engine]) -> str:
    """The results as a Markdown table."""
    metrics = list(dict.fromkeys(name for engine in engines for name in engine.metrics))
    rows = [["engine", *metrics, "ms", "p10", "p90", "MB", "compile s"]]
    for engine in engines:
        measured = [number(engine.metrics.get(name), 4) for name in metrics]
        timing = engine.timing
        spread = [number(value, 3) for value in ((timing.median, timing.p10, timing.p90) if timing else (None,) * 3)]
        rows.append([engine.name, *measured, *spread, number(engine.megabytes, 1), number(engine.compile_seconds, 1)])
    return markdown(rows)
