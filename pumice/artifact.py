"""A compiled model: the library that ships, loaded and called with NumPy arrays.

Running needs TVM and NumPy, nothing that compiling needs (no onnx, no torch, no C compiler).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm

from pumice.errors import ModelError, UnsupportedError, UsageError
from pumice.profile import Profile, profile_steps
from pumice.record import LayerRecord
from pumice.report_table import format_report
from pumice.targets.detect import host_architecture, host_features
from pumice.targets.executor import load_library
from pumice.targets.library import move_into_place
from pumice.targets.manifest import read_manifest
from pumice.threads import check_threads, use_threads


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name in the source model, its shape and its NumPy dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {'x'.join(map(str, self.shape)) or 'scalar'}"


class CompiledModel:
    """A compiled library: ``model(image=array)`` runs it, ``model.layers`` and ``model.report()`` describe it.

    One inference at a time runs through one instance; calls from several threads take turns.
    """

    def __init__(
        self, path: str | Path, threads: int | None = None, owner: TemporaryDirectory[str] | None = None
    ) -> None:
        """``owner`` is the folder of a library not saved yet: it lives as long as this object."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.inputs = [_spec(entry) for entry in self.manifest["inputs"]]
        self.outputs = [_spec(entry) for entry in self.manifest["outputs"]]
        wanted = threads if threads is not None else self.manifest.get("threads")
        self.threads = check_threads(wanted)
        self._names = {spec.name: np.dtype(spec.dtype) for spec in self.inputs}
        self._owner = owner
        self._lock = threading.RLock()
        self._runner: _Runner | None = None

    @property
    def layers(self) -> list[LayerRecord]:
        """What became of each layer, in execution order."""
        return [LayerRecord.from_json(entry) for entry in self.manifest["layers"]]

    def report(self, width: int = 160) -> str:
        """The table per layer and the totals, for a terminal of ``width`` columns."""
        return format_report(self.manifest, width)

    def save(self, path: str | Path) -> None:
        """Write the library to ``path``: complete, or not at all. Raises UsageError where it cannot be written."""
        move_into_place(self.path, Path(path))

    def __call__(self, *arrays: Any, **named: Any) -> dict[str, np.ndarray]:
        """Run one inference; the outputs by name, in arrays of their own.

        Inputs go by name (``model(image=a)``, or one dict for names that are no identifiers) or by position. An
        array must have the input's shape; float64 is rounded to the float32 that a model wants, and a narrower type
        of the same kind is widened, but nothing is cast between integers and floats: bytes 0..255 given for an
        image in 0..1 would be silently wrong. NaN and infinity pass through. Raises UsageError for what does not fit.
        """
        feed = self._bind(arrays, named)
        with self._lock:
            return self._ready().run(feed, self.threads)

    def profile(self, feed: Mapping[str, Any], seconds: float = 3.0) -> Profile:
        """The time of every step of an inference on ``feed`` (arrays by input name), measured for ``seconds``."""
        with self._lock:
            runner, arrays = self._ready(), self._bind((), feed)
            runner.run(arrays, self.threads)
            steps = self.manifest["steps"]
            return profile_steps(runner.executor, lambda: self(feed), steps, self.layers, seconds)

    def _ready(self) -> _Runner:
        if self._runner is None:
            self._runner = _Runner(self.path, self.manifest, self.inputs, self.outputs)
        return self._runner

    def _bind(self, arrays: tuple[Any, ...], named: Mapping[str, Any]) -> list[np.ndarray]:
        if len(arrays) == 1 and isinstance(arrays[0], Mapping):
            named, arrays = {**arrays[0], **named}, ()
        names = self._names
        if len(arrays) == len(names) and not named:
            given: Sequence[Any] = arrays
        elif not arrays and named.keys() == names.keys():
            given = [named[name] for name in names]
        else:
            given = self._bind_mixed(arrays, named)
        return [_fit(value, spec, dtype) for value, spec, dtype in zip(given, self.inputs, names.values(), strict=True)]

    def _bind_mixed(self, arrays: tuple[Any, ...], named: Mapping[str, Any]) -> list[Any]:
        """Some by position and the others by name; or what is wrong with them."""
        names = list(self._names)
        if len(arrays) > len(names):
            raise UsageError(f"{self.path.name} takes {len(names)} inputs ({', '.join(names)}), not {len(arrays)}")
        given = dict(zip(names, arrays, strict=False))
        for problem, which in (
            ("given twice", [name for name in given if name in named]),
            ("missing", [name for name in names if name not in given and name not in named]),
            ("not known", [name for name in named if name not in names]),
        ):
            if which:
                listed = "; ".join(str(spec) for spec in self.inputs)
                raise UsageError(
                    f"{self.path.name}: input '{which[0]}' is {problem}; the model takes {listed or 'no inputs'}"
                )
        return [{**given, **named}[name] for name in names]


def load(path: str | Path, threads: int | None = None) -> CompiledModel:
    """Load a library that Pumice compiled, ready to run on ``threads`` threads (None: one for each core).

    Raises UnsupportedError, before any of its code is loaded, for a library of another architecture, one whose
    instructions this CPU lacks, or one compiled with another TVM; ModelError for a file that is no such library;
    UsageError for a thread count below one.
    """
    model = CompiledModel(path, threads)
    model._ready()
    return model


class _Runner:
    """The loaded code with its buffers: kernels may assume 64 bytes of alignment, a NumPy array has 16."""

    def __init__(
        self, path: Path, manifest: dict[str, Any], inputs: list[TensorSpec], outputs: list[TensorSpec]
    ) -> None:
        _check_runs_here(path, manifest)
        shapes = [[(spec.shape, spec.dtype) for spec in specs] for specs in (inputs, outputs)]
        try:
            self.executor = load_library(path, int(manifest["workspace"]), int(manifest["scratch"]), *shapes)
        except (RuntimeError, AttributeError, ValueError, OSError) as error:
            raise ModelError(f"{path}: cannot be loaded ({first_line(error)}); compile the model again") from error
        self._outputs = [(spec.name, buffer) for spec, buffer in zip(outputs, self.executor.outputs, strict=True)]

    def run(self, feed: list[np.ndarray], threads: int) -> dict[str, np.ndarray]:
        use_threads(threads)
        for buffer, array in zip(self.executor.inputs, feed, strict=True):
            buffer[...] = array
        self.executor.run()
        return {name: buffer.copy() for name, buffer in self._outputs}


def _check_runs_here(path: Path, manifest: dict[str, Any]) -> None:
    target, compiled_with = manifest["target"], str(manifest["versions"]["tvm"])
    if target["architecture"] != host_architecture():
        raise UnsupportedError(
            f"{path}: was compiled for {target['architecture']} (target {target['name']}) and this machine is "
            f"{host_architecture()}; compile it with --target native"
        )
    missing = sorted(set(target["features"]) - host_features())
    if missing:
        raise UnsupportedError(
            f"{path}: was compiled for target {target['name']} and this CPU lacks {', '.join(missing)}; compile it "
            "with --target native on this machine"
        )
    if compiled_with.split(".")[:2] != tvm.__version__.split(".")[:2]:
        raise UnsupportedError(
            f"{path}: was compiled with TVM {compiled_with} and this is TVM {tvm.__version__}; compile it again, or "
            f'`pip install "apache-tvm=={compiled_with}"`'
        )


def _fit(value: Any, spec: TensorSpec, wanted: np.dtype[Any]) -> np.ndarray:
    if type(value) is np.ndarray and value.dtype == wanted and value.shape == spec.shape:
        return value
    array = np.asarray(value)
    if array.dtype != wanted:
        same_kind = array.dtype.kind == wanted.kind
        narrowing = array.dtype == np.float64 and wanted == np.float32
        if not (same_kind and (narrowing or np.can_cast(array.dtype, wanted, "safe"))):
            raise UsageError(
                f"input '{spec.name}' is {array.dtype} and the model takes {wanted}: convert it, with the scaling "
                f"that the model was trained with (array.astype('{wanted}') if there is none)"
            )
    if array.shape != spec.shape:
        raise UsageError(f"input '{spec.name}' has shape {array.shape} and the model takes {spec.shape}")
    return array


def _spec(entry: dict[str, Any]) -> TensorSpec:
    return TensorSpec(str(entry["name"]), tuple(int(d) for d in entry["shape"]), str(entry["dtype"]))


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
