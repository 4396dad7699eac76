"""What ``compile --emit-onnx`` writes, run by ONNX Runtime, beside the library that the same compilation made.

    python -m bench.emitted --data DIR

On real inputs that did not calibrate: the signal-to-noise ratio of ONNX Runtime's outputs against the library's, that
of both against the float network, how often the largest output is the same one, and how many convolutions and matrix
products ONNX Runtime computes on integers (in brackets: of how many that are int8 in the file).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime

import pumice
from bench import engines, mobilenet, sentence_encoder
from bench.data_pictures import read_pictures, split
from bench.data_texts import calibration_texts, read_word_pairs
from bench.tables import markdown, number
from pumice.demo.run import read_data
from pumice.peers import OnnxRuntime

_INTEGER = ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm", "DynamicQuantizeMatMul")


@dataclass(frozen=True)
class Subject:
    """A model file and what it is fed: samples along the first axis, and the labels of the test samples, if known."""

    model: Path
    calibration: engines.Feed
    test: engines.Feed
    labels: np.ndarray | None = None
    float_budget: float = 0.0


def _demo(data: Path, work: Path) -> Subject:
    """The network of ``pumice demo`` with 90 % of its blocks zero, on Fashion-MNIST's test images."""
    read = read_data(Path(str(files("pumice.demo"))), work)
    test = {"image": read.test_images}
    return Subject(read.models["blocks90"], {"image": read.calibration_images}, test, read.test_labels)


def _minilm(data: Path, work: Path) -> Subject:
    """MiniLM-L6 at 128 tokens, on the words of WordSim-353."""
    network, tokenizer = sentence_encoder.load_network(data)
    words = read_word_pairs(data)["WordSim-353"].words()
    calibration = sentence_encoder.tokenize(tokenizer, calibration_texts(data, 64, 64, set(words)))
    test = sentence_encoder.tokenize(tokenizer, sorted(set(words))[:200])
    path = engines.export(network, next(engines.samples_of(calibration)), work / "minilm.onnx")
    return Subject(path, calibration, test)


def _mobilenet(data: Path, work: Path) -> Subject:
    """MobileNetV2 on photographs."""
    calibrating, tested = split(read_pictures(data).values())
    network, feed = mobilenet.load_network(data), {"image": tested}
    path = engines.export(network, next(engines.samples_of(feed)), work / "mobilenet_v2.onnx")
    return Subject(path, {"image": calibrating}, feed, float_budget=mobilenet.FLOAT_BUDGET)


SUBJECTS: dict[str, Callable[[Path, Path], Subject]] = {"demo": _demo, "minilm": _minilm, "mobilenet": _mobilenet}


def measure(name: str, subject: Subject, work: Path) -> list[str]:
    """One line of the table."""
    emitted = work / f"{name}-emitted.onnx"
    shapes = {key: (1, *array.shape[1:]) for key, array in subject.test.items()}
    options = {"inputs": shapes, "threads": 1}
    library = pumice.compile(
        subject.model, calibration=subject.calibration, float_budget=subject.float_budget, emit_onnx=emitted, **options
    )
    plain = pumice.compile(subject.model, quantize=False, **options)
    peer = OnnxRuntime(emitted.read_bytes(), 1)
    ours, theirs, reference = (_outputs(run, subject.test) for run in (library, peer.run, plain))
    right = "-"
    if subject.labels is not None:
        right = " / ".join(f"{100 * np.mean(each.argmax(1) == subject.labels):.2f}" for each in (ours, theirs))
    return [
        name,
        str(len(ours)),
        *(number(_decibels(*pair), 4) for pair in ((theirs, ours), (ours, reference), (theirs, reference))),
        f"{100 * np.mean(ours.argmax(1) == theirs.argmax(1)):.2f}",
        right,
        _integer_kernels(emitted),
    ]


def _outputs(run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], feed: engines.Feed) -> np.ndarray:
    return np.concatenate([next(iter(run(sample).values())) for sample in engines.samples_of(feed)])


def _decibels(values: np.ndarray, reference: np.ndarray) -> float:
    noise = np.square(values.astype(np.float64) - reference).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(noise, 1e-30)))


def _integer_kernels(path: Path) -> str:
    """Of the optimized graph, which ONNX Runtime writes."""
    with TemporaryDirectory(prefix="pumice-") as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    count = sum(node.op_type in _INTEGER for node in optimized.graph.node)
    weights = sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in onnx.load(path).graph.initializer)
    return f"{count} ({weights})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The emitted ONNX model on ONNX Runtime beside the library.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the downloaded packages (bench/README.md)")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    options = parser.parse_args()
    rows = [
        ["network", "samples", "SNR dB", "library", "ONNX Runtime", "same top-1 %", "accuracy %", "integer kernels"]
    ]
    with TemporaryDirectory(prefix="pumice-") as folder:
        for name in options.subjects:
            rows.append(measure(name, SUBJECTS[name](options.data, Path(folder)), Path(folder)))
            print(" | ".join(rows[-1]), flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
