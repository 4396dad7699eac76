"""The demo: the embedded Fashion-MNIST networks, compiled dense and sparse, on real images, beside ONNX Runtime."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pumice.arrays import read_arrays
from pumice.artifact import CompiledModel, load
from pumice.bench import Timing, measure
from pumice.driver import compile_model
from pumice.errors import MissingDependencyError, UsageError
from pumice.peers import OnnxRuntime, quantize_int8, read_pinned

SHAPE = (1, 1, 28, 28)

Predict = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[str, float | None], None]


@dataclass
class Entry:
    """One line of the demo's table."""

    name: str
    engine: str  # pumice, onnxruntime
    model: str  # which embedded network
    file_bytes: int  # the library, or the .onnx file that ONNX Runtime reads
    weight_bytes: int | None  # weights, indices, biases and scales as stored, where that is known
    accuracy: float = 0.0  # % of the test images
    agreement: float = 0.0  # % of the test images where the answer is that of the dense float32 network
    milliseconds: float = 0.0  # for one image, the median
    p10: float = 0.0
    p90: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


@dataclass(frozen=True)
class DemoData:
    """The networks (as files) and the images (float32 in 0..1, one channel)."""

    models: dict[str, Path]
    test_images: np.ndarray
    test_labels: np.ndarray
    calibration_images: np.ndarray


def read_data(folder: Path, scratch: Path) -> DemoData:
    """``fashion.zip`` and ``fashion.npz`` of ``folder``; the networks are unpacked into ``scratch``."""
    for name in ("fashion.zip", "fashion.npz"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name}: the demo's data is missing; install pumice again or give --data FOLDER")
    models = {}
    with zipfile.ZipFile(folder / "fashion.zip") as archive:
        for name in ("dense", "blocks80", "blocks90"):
            models[name] = scratch / f"{name}.onnx"
            models[name].write_bytes(archive.read(f"{name}.onnx"))
    arrays = read_arrays(folder / "fashion.npz")
    test, calibration = (to_input(arrays[f"{kind}_images"]) for kind in ("test", "calibration"))
    return DemoData(models, test, arrays["test_labels"], calibration)


def to_input(images: np.ndarray) -> np.ndarray:
    """Bytes ``[N, 28, 28]`` to what the networks were trained on: float32 ``[N, 1, 28, 28]`` in 0..1."""
    return (images.astype(np.float32) / 255)[:, None]


def run_demo(
    data: DemoData, scratch: Path, target: str, threads: int | None, seconds: float, progress: Progress
) -> tuple[list[Entry], list[str]]:
    """Compile, run every test image through every engine, time them in turns; the table and remarks on it."""
    engines: list[tuple[Entry, Predict]] = list(_pumice_engines(data, scratch, target, threads, progress))
    notes: list[str] = []
    used_threads = load(scratch / "dense-float32.so", threads).threads
    try:
        engines += _peer_engines(data, used_threads, progress)
    except MissingDependencyError as error:
        notes.append(f"{error}; the table goes without it")
    reference: np.ndarray | None = None
    for entry, predict in engines:
        with_progress = f"run {len(data.test_images)} images: {entry.name}"
        answers = _answers(predict, data.test_images, with_progress, progress)
        reference = answers if reference is None else reference
        entry.accuracy = 100 * float(np.mean(answers == data.test_labels))
        entry.agreement = 100 * float(np.mean(answers == reference))
    progress("time them in turns", None)
    timings = measure({entry.name: _on_one_image(predict, data) for entry, predict in engines}, seconds)
    progress("time them in turns", seconds)
    for (entry, _), timing in zip(engines, timings, strict=True):
        _keep(entry, timing)
    notes.append(f"times on {used_threads} thread{'s' if used_threads > 1 else ''}, one image at a time")
    return [entry for entry, _ in engines], notes


def _pumice_engines(
    data: DemoData, scratch: Path, target: str, threads: int | None, progress: Progress
) -> Iterator[tuple[Entry, Predict]]:
    for model, quantize, name in (
        ("dense", False, "Pumice float32"),
        ("dense", True, "Pumice int8"),
        ("blocks80", True, "Pumice int8, 80 % zero"),
        ("blocks90", True, "Pumice int8, 90 % zero"),
    ):

        def tell(stage: str, spent: float | None, name: str = name) -> None:
            progress(f"{name}: {stage}", spent)

        compiled = compile_model(
            data.models[model],
            target=target,
            inputs={"image": SHAPE},
            calibration={"image": data.calibration_images} if quantize else None,
            quantize=quantize,
            progress=tell,
        )
        path = scratch / f"{model}-{'int8' if quantize else 'float32'}.so"
        compiled.save(path)
        weights = sum(layer.compiled_bytes for layer in compiled.layers)
        entry = Entry(name, "pumice", model, path.stat().st_size, weights or None)
        yield entry, _predict_with(load(path, threads))


def _peer_engines(data: DemoData, threads: int, progress: Progress) -> list[tuple[Entry, Predict]]:
    engines = []
    for model, quantize, name in (
        ("dense", False, "ONNX Runtime float32"),
        ("dense", True, "ONNX Runtime int8"),
        ("blocks90", True, "ONNX Runtime int8, 90 % zero"),
    ):
        content = read_pinned(data.models[model], {"image": SHAPE})
        if quantize:
            content = quantize_int8(content, {"image": data.calibration_images})
        peer = OnnxRuntime(content, threads)
        engines.append((Entry(name, "onnxruntime", model, len(content), None), _predict_with(peer.run)))
    return engines


def _predict_with(run: CompiledModel | Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Predict:
    return lambda image: run({"image": image})["logits"]


def _answers(predict: Predict, images: np.ndarray, stage: str, progress: Progress) -> np.ndarray:
    progress(stage, None)
    start = time.perf_counter()
    answers = np.array([predict(images[i : i + 1]).argmax() for i in range(len(images))])
    progress(stage, time.perf_counter() - start)
    return answers


def _on_one_image(predict: Predict, data: DemoData) -> Callable[[], np.ndarray]:
    image = np.ascontiguousarray(data.test_images[:1])
    return lambda: predict(image)


def _keep(entry: Entry, timing: Timing) -> None:
    entry.milliseconds, entry.p10, entry.p90 = timing.median, timing.p10, timing.p90
