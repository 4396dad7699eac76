"""OpenVINO on the CPU, as a user would run it. Its telemetry is never loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from pumice.artifact import first_line
from pumice.errors import MissingDependencyError, ModelError, UnsupportedError
from pumice.peers.model import is_quantized

_TELEMETRY = "openvino_telemetry"


class OpenVino:
    """One compiled model, on a fixed number of threads, tuned for latency; used as ``OnnxRuntime`` is.

    A float model computes in float32: left to itself OpenVINO takes bfloat16 where the CPU has it. A quantized
    (QDQ) model runs in int8, and what is not quantized in it as OpenVINO pleases, which is its fastest.
    """

    title = "OpenVINO"

    def __init__(self, model: bytes, threads: int, on_gpu: bool = False, profile: bool = False) -> None:
        """``profile`` keeps what ``operator_means`` tells. Raises UnsupportedError if it is to run ``on_gpu``."""
        if on_gpu:
            raise UnsupportedError(
                "the library runs on NVIDIA's GPU, where OpenVINO has no engine: compare with ONNX Runtime"
            )
        core = import_openvino().Core()
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # it would pin to cores that this process may not use
            "PERF_COUNT": profile,
        }
        if not is_quantized(model):
            config["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            compiled = core.compile_model(core.read_model(model), "CPU", config)
        except Exception as error:  # its errors share no class but RuntimeError, ValueError and TypeError come too
            raise ModelError(f"OpenVINO cannot run the model: {first_line(error)}") from error
        self.outputs = [str(output.any_name) for output in compiled.outputs]
        self._ports = list(compiled.outputs)
        self._request = compiled.create_infer_request()

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        result = self._request.infer(feed, share_inputs=True)
        return {name: result[port] for name, port in zip(self.outputs, self._ports, strict=True)}

    def infer(self, feed: Mapping[str, np.ndarray]) -> None:
        """One inference whose outputs nobody wants: they are not copied."""
        self._request.infer(feed, share_inputs=True, share_outputs=True)

    def operator_means(self) -> dict[str, float]:
        """The milliseconds spent in each type of operator in one inference: the mean of all since the model was made.

        OpenVINO cuts the mean of each operator to whole microseconds.
        """
        spent: dict[str, float] = {}
        for entry in self._request.profiling_info:
            spent[entry.node_type] = spent.get(entry.node_type, 0.0) + entry.real_time.total_seconds() * 1e3
        return spent


def import_openvino() -> Any:
    """The package; raises MissingDependencyError where it is not installed.

    Importing it sends an event to its makers unless the user has opted out. It falls back to a stub that sends
    nothing where its telemetry package is missing, so for the length of the import that is what it finds.
    """
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            "OpenVINO is needed to compare with it and is not installed: `pip install openvino` "
            "(or `pip install 'pumice[openvino]'`)"
        ) from error
    finally:
        del sys.modules[_TELEMETRY]
        if before is not None:
            sys.modules[_TELEMETRY] = before
    return openvino
