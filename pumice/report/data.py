"""What a report holds: the library's manifest, and times, accuracy and the advisor's points where there are any."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pumice.artifact import CompiledModel, first_line, load
from pumice.bench import Timing, measure
from pumice.errors import MissingDependencyError, ModelError, UnsupportedError, UsageError
from pumice.evaluation import Metric
from pumice.loader import read_manifest
from pumice.profile import Profile
from pumice.record import LayerRecord

if TYPE_CHECKING:
    from pumice.peers import OnnxRuntime

# A stage begins (None), has ended after so many seconds, or has failed (NaN).
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class File:
    """A file that the report is about."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> File:
        """Raises ModelError where it cannot be read."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        return cls(Path(path).name, len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Accuracy:
    """One number of a metric, higher being better: of the original, where it was measured, and of the library."""

    name: str
    before: float | None
    after: float
    measured: str  # with what, or when


@dataclass(frozen=True)
class Point:
    """One way to compile the model that the advisor looked at."""

    label: str
    latency_ms: float | None = None  # None where it can neither be measured here nor summed
    bytes: float | None = None
    error: float | None = None  # noise over signal of the outputs, as the advisor estimates or measures it
    metric: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Report:
    """All that the page shows. ``remarks`` says, for what is missing or needs care, why: in a sentence by section."""

    library: File
    manifest: dict[str, Any]
    original: File | None = None
    place: str = ""  # what the times were measured on
    timings: Sequence[Timing] = ()  # of the library, then of the original
    profile: Profile | None = None
    accuracy: Sequence[Accuracy] = ()
    points: Sequence[Point] = ()
    remarks: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[LayerRecord]:
        """The records of the manifest, in execution order."""
        return [LayerRecord.from_json(entry) for entry in self.manifest["layers"]]

    def layer_microseconds(self) -> dict[str, float]:
        """The median time of each layer by its name; empty where none was measured."""
        times: dict[str, float] = {}
        for step in self.profile.steps if self.profile else ():
            if step.is_layer:
                times[step.name] = times.get(step.name, 0.0) + step.median_us
        return times

    def to_json(self) -> dict[str, Any]:
        """The same as data for ``--json``."""
        return {
            "library": asdict(self.library),
            "original": asdict(self.original) if self.original else None,
            "manifest": self.manifest,
            "place": self.place,
            "engines": [timing.to_json() for timing in self.timings],
            "profile": self.profile.to_json() if self.profile else None,
            "accuracy": [asdict(entry) for entry in self.accuracy],
            "points": [asdict(point) for point in self.points],
            "remarks": dict(self.remarks),
        }


@dataclass(frozen=True)
class Request:
    """What a report is made of besides the library: all of it is optional, and what it would give is left out then."""

    model: Path | None = None  # the original, an .onnx file
    metric: Metric | None = None
    advice: Path | None = None
    feed: Callable[[CompiledModel], Mapping[str, np.ndarray]] | None = None  # what it is timed on; None: it is not
    threads: int | None = None
    seconds: float = 5.0


def make_report(library: str | Path, request: Request, progress: Progress) -> Report:
    """Read the library, and measure here what the request asks for. Nothing of a library is executed without need.

    Raises ModelError for a file that is no library or no ONNX model with its inputs, UnsupportedError where a metric
    is asked for and the library cannot run here, UsageError for a metric that fails and for wrong inputs or advice.
    """
    manifest = read_manifest(library)
    report = Report(File.of(library), manifest, accuracy=_accuracy_in(manifest, str(library)))
    if request.advice:
        report = replace(report, points=read_advice(request.advice))
    if request.model:
        report = _with_original(report, request.model)
    if not request.feed:
        report = _remark(report, time="They were left out on request (--no-time).")
    if not (request.feed or request.metric):
        return report
    try:
        model = load(library, request.threads)
    except (UnsupportedError, MissingDependencyError) as error:
        if request.metric:
            raise
        return _remark(report, time=f"They were not measured: {error}.")
    peer = None
    if request.model:
        try:
            peer = _peer(request.model, model)
        except MissingDependencyError as error:
            report = _remark(report, peer=f"The original was neither timed nor evaluated: {error}.")
    if request.feed:
        report = _with_times(report, model, peer, request.feed(model), request.seconds, progress)
    return _with_accuracy(report, model, peer, request.metric, progress) if request.metric else report


def read_advice(path: str | Path) -> list[Point]:
    """The points of a file of ``pumice advise``, the fastest first, those of unknown time last.

    Raises UsageError for a file that is none.
    """
    try:
        entries = json.loads(Path(path).read_bytes())["points"]
        points = [_point(entry) for entry in entries]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(f"{path}: is not what `pumice advise` writes ({what}); give its advice.json") from error
    return sorted(points, key=lambda point: math.inf if point.latency_ms is None else point.latency_ms)


def _with_original(report: Report, path: Path) -> Report:
    original, compiled = File.of(path), report.manifest["source"].get("sha256")
    if compiled and original.sha256 != compiled:
        report = _remark(
            report,
            original=f"{original.name} is not the file that was compiled (its SHA-256 is another), so what is said to "
            "be before is another model.",
        )
    return replace(report, original=original)


def _peer(path: Path, model: CompiledModel) -> OnnxRuntime:
    """The original in ONNX Runtime, on as many threads as the library, or on the GPU as it is."""
    from pumice.peers import OnnxRuntime, is_quantized, read_pinned

    content = read_pinned(path, {spec.name: spec.shape for spec in model.inputs})
    peer = OnnxRuntime(content, model.threads, _on_gpu(model))
    peer.title += " int8 (as given)" if is_quantized(content) else " float32"
    return peer


def _with_times(
    report: Report,
    model: CompiledModel,
    peer: OnnxRuntime | None,
    feed: Mapping[str, np.ndarray],
    seconds: float,
    progress: Progress,
) -> Report:
    from pumice.targets.detect import host_cpu

    model(feed)  # wrong inputs are an error before anything is measured
    calls: dict[str, Callable[[], Any]] = {"Pumice": lambda: model(feed)}
    if peer:
        calls[peer.title] = partial(peer.run, feed)
    with _stage(progress, "time whole inferences"):
        timings = measure(calls, seconds)
    with _stage(progress, "time each layer"):
        profile = model.profile(feed, seconds)
    threads = f"{model.threads} thread{'s' * (model.threads > 1)}"
    place = "an NVIDIA GPU" if _on_gpu(model) else f"{threads} of {host_cpu()}"
    return replace(report, timings=timings, profile=profile, place=place)


def _with_accuracy(
    report: Report, model: CompiledModel, peer: OnnxRuntime | None, metric: Metric, progress: Progress
) -> Report:
    with _stage(progress, "evaluate the library"):
        after = metric(model)
    before: dict[str, float] = {}
    if peer:
        with _stage(progress, "evaluate the original"):
            before = metric(peer.run)
    how = f"by {metric.script.name}:{metric.name} for this report"
    measured = [Accuracy(name, before.get(name), value, how) for name, value in after.items()]
    return replace(report, accuracy=[*measured, *(entry for entry in report.accuracy if entry.name not in after)])


def _accuracy_in(manifest: Mapping[str, Any], library: str) -> list[Accuracy]:
    """What was measured when the library was compiled, under a budget of accuracy."""
    try:
        found = dict(manifest.get("accuracy") or {})
        return [
            Accuracy(str(name), _number(entry.get("before")), float(entry["after"]), "when it was compiled")
            for name, entry in found.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{library}: what its manifest says of accuracy is damaged; compile the model again"
        ) from error


def _point(entry: Mapping[str, Any]) -> Point:
    numbers = {name: _number(entry.get(name)) for name in ("latency_ms", "bytes", "error", "metric")}
    if numbers["latency_ms"] is not None and numbers["latency_ms"] < 0:
        raise ValueError(f"a latency_ms of {numbers['latency_ms']:g}")
    return Point(str(entry["label"]), chosen=bool(entry.get("chosen")), **numbers)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is no finite number")
    return number


def _on_gpu(model: CompiledModel) -> bool:
    return bool(model.manifest["target"].get("gpus"))


def _remark(report: Report, **remarks: str) -> Report:
    return replace(report, remarks={**report.remarks, **remarks})


@contextmanager
def _stage(progress: Progress, name: str) -> Iterator[None]:
    progress(name, None)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        progress(name, math.nan)
        raise
    progress(name, time.perf_counter() - start)
