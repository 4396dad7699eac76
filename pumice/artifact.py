"""A compiled model: the library that ships, loaded and called with NumPy arrays.

Running it is ``pumice.loader``'s; this adds what a developer asks of it: the record of each layer, a report, times.
Nothing that compiling needs is imported: no TVM, no onnx, no torch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pumice import loader
from pumice.files import move_into_place
from pumice.loader import Model, TensorSpec, read_manifest, signature
from pumice.profile import Profile, profile_steps
from pumice.record import LayerRecord
from pumice.report_table import format_report
from pumice.threads import check_threads

__all__ = ["CompiledModel", "TensorSpec", "load"]


class CompiledModel:
    """A compiled library: ``model(image=array)`` runs it, ``model.layers`` and ``model.report()`` describe it.

    One inference at a time runs through one instance; calls from several threads take turns.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        owner: TemporaryDirectory[str] | None = None,
        model: Model | None = None,
    ) -> None:
        """``owner`` is the folder of a library not saved yet: it lives as long as this object; ``model`` is opened."""
        self.path = Path(path)
        self.manifest = model.manifest if model else read_manifest(self.path)
        self.inputs, self.outputs = signature(self.manifest)
        self.threads = model.threads if model else _threads(threads, self.manifest)
        self._owner = owner
        self._model = model
        self._opening = threading.Lock()

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
        """Run one inference; the outputs by name, in arrays of their own. See ``pumice.loader.Model``."""
        return self.open()(*arrays, **named)

    def verify(self) -> None:
        """Hold the numbers of every layer here against those of compilation. See ``pumice.loader.Model.verify``."""
        self.open().verify()

    def profile(self, feed: Mapping[str, Any], seconds: float = 3.0) -> Profile:
        """The time of every step of an inference on ``feed`` (arrays by input name), measured for ``seconds``."""
        model = self.open()
        arrays = model.bind((), feed)
        results = list(model(*arrays).values())

        def run(first: int = 0, last: int | None = None) -> None:
            model.run(arrays, results, first, last)

        return profile_steps(run, lambda: self(feed), self.manifest["steps"], self.layers, seconds)

    def open(self) -> Model:
        """The library, opened on first use: one for another machine can be described but not opened."""
        with self._opening:
            if self._model is None:
                self._model = loader.load(self.path, self.threads)
        return self._model


def load(path: str | Path, threads: int | None = None) -> CompiledModel:
    """Load a library or a bundle, ready to run on ``threads`` threads (None: as compiled, or one for each core).

    Raises UnsupportedError, before any of its code is loaded, for a library of another architecture, one whose
    instructions this CPU lacks, or a bundle without any for this machine; ModelError for a file that is neither;
    UsageError for a thread count below one.
    """
    if loader.is_bundle(path):
        return CompiledModel(path, model=loader.load(path, check_threads(threads)))
    model = CompiledModel(path, threads)
    model.open()
    return model


def _threads(asked: int | None, manifest: Mapping[str, Any]) -> int:
    return check_threads(asked if asked is not None else manifest.get("threads"))


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
