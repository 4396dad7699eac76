"""ONNX Runtime, as a user would run it: on the CPU, or on NVIDIA's GPU through TensorRT or CUDA."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from pumice.artifact import first_line
from pumice.errors import MissingDependencyError, ModelError
from pumice.peers.model import is_quantized

# Its execution providers for NVIDIA's GPUs, the fastest first, by what a table calls them.
_ON_GPU = {"TensorrtExecutionProvider": "TensorRT", "CUDAExecutionProvider": "CUDA"}

_INSTALL = "`pip uninstall onnxruntime`, then `pip install onnxruntime-gpu[cuda,cudnn]`, and `tensorrt` for the fastest"


class OnnxRuntime:
    """One session, on a fixed number of threads; ``run`` takes and gives arrays by name, as a CompiledModel does.

    ``on_gpu``: all of it runs on the GPU, and ``title`` says through what; arrays are copied there and back, as Pumice
    copies them. What TensorRT does not take, CUDA computes: quantized layers in float.
    """

    title = "ONNX Runtime"

    def __init__(self, model: bytes, threads: int, on_gpu: bool = False) -> None:
        """Raises MissingDependencyError without the package, or without what it needs for the GPU."""
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        if on_gpu:
            providers = gpu_providers(runtime)
            self.title = f"ONNX Runtime ({', '.join(_ON_GPU[name] for name in providers)})"
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        configured = [(name, _provider_options(name, model)) for name in providers]
        try:
            # It would fall back to the CPU by itself.
            self._session = runtime.InferenceSession(model, options, providers=configured, enable_fallback=False)
        except Exception as error:  # its errors share no class but Exception
            raise ModelError(f"{self.title} cannot run the model: {first_line(error)}") from error
        self.outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference."""
        return dict(zip(self.outputs, self._session.run(None, dict(feed)), strict=True))

    def infer(self, feed: Mapping[str, np.ndarray]) -> None:
        """One inference whose outputs nobody wants."""
        self._session.run(None, feed)


def gpu_providers(runtime: Any) -> list[str]:
    """The execution providers for NVIDIA's GPUs that load on this machine, the fastest first.

    Raises MissingDependencyError where there is none.
    """
    built_in = [name for name in _ON_GPU if name in runtime.get_available_providers()]
    if not built_in:
        raise MissingDependencyError(
            "the library runs on a GPU, and the ONNX Runtime that is installed only on CPUs, which would be no "
            f"comparison: {_INSTALL}"
        )
    if hasattr(runtime, "preload_dlls"):  # from 1.21 on: CUDA and cuDNN where pip puts them
        with redirect_stdout(sys.stderr):
            runtime.preload_dlls()
    found, reasons = [], []
    for name in built_in:
        why = _why_not(runtime, name)
        if why is None:
            found.append(name)
        else:
            reasons.append(f"{_ON_GPU[name]}: {why}")
    if not found:
        raise MissingDependencyError(
            f"the library runs on a GPU, and nothing of ONNX Runtime does here ({'; '.join(reasons)}): {_INSTALL}"
        )
    return found


def _why_not(runtime: Any, provider: str) -> str | None:
    """Why a provider that was built in does not load; that shows when a session, here of an empty model, wants it."""
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "empty", [value], [value])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its complaint becomes the reason
    try:
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=[provider], enable_fallback=False
        )
    except Exception as error:  # its errors share no class but Exception
        return first_line(error)
    return None if provider in session.get_providers() else "its libraries are missing"


def _provider_options(name: str, model: bytes) -> dict[str, Any]:
    """TensorRT heeds the quantization only if it is told to; it then chooses the fastest for the rest too."""
    if name != "TensorrtExecutionProvider" or not is_quantized(model):
        return {}
    return {"trt_int8_enable": True, "trt_fp16_enable": True}


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
