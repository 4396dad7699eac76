"""ONNX Runtime on the CPU, as a user would run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pumice.artifact import first_line
from pumice.errors import MissingDependencyError, ModelError


class OnnxRuntime:
    """One session, on a fixed number of threads; ``run`` takes and gives arrays by name, as a CompiledModel does."""

    title = "ONNX Runtime"

    def __init__(self, model: bytes, threads: int) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class but Exception
            raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        self.outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        return dict(zip(self.outputs, self._session.run(None, dict(feed)), strict=True))

    def infer(self, feed: Mapping[str, np.ndarray]) -> None:
        """One inference whose outputs nobody wants."""
        self._session.run(None, feed)


def import_onnxruntime() -> Any:
    """The package; raises MissingDependencyError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX Runtime is needed, to compare with it or to quantize, and is not installed: "
            "`pip install onnxruntime` (or `pip install 'pumice[bench]'`)"
        ) from error
    return onnxruntime
