"""Beside a library for a GPU: who runs there, and that nobody runs on the CPU instead. No GPU, so a faked runtime."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny import tiny_onnx

from pumice import artifact, cli
from pumice.errors import MissingDependencyError, ModelError, UnsupportedError
from pumice.peers import OnnxRuntime, OpenVino, is_quantized, quantize_int8

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
IMAGES = np.random.default_rng(1).random((4, 1, 8, 8), dtype=np.float32)
FLOAT = tiny_onnx(batch=1).SerializeToString()


class FakeRuntime(ModuleType):
    """ONNX Runtime with these providers built in, of which some load; others do so silently not, or raise."""

    def __init__(self, built_in, loading, error=None, unable=False):
        super().__init__("onnxruntime")
        self.loading, self.error, self.unable = loading, error, unable
        self.opened = []  # the providers and the configuration of each session on the model
        self.get_available_providers = lambda: [*built_in, CPU]

    class SessionOptions(SimpleNamespace):
        def __init__(self):
            super().__init__(entries={})

        def add_session_config_entry(self, key, value):
            self.entries[key] = value

    def InferenceSession(self, model, options, providers, enable_fallback):
        assert not enable_fallback
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        if self.error and names[0] not in self.loading:
            raise RuntimeError(self.error)
        if onnx.load_from_string(model).graph.node:
            if self.unable:
                raise RuntimeError("nodes are assigned to the CPU\nand more")
            self.opened.append((providers, options.entries))
        outputs = [SimpleNamespace(name="logits")]
        registered = [*(name for name in names if name in self.loading), CPU]
        return SimpleNamespace(get_providers=lambda: registered, get_outputs=lambda: outputs)


@pytest.fixture
def install(monkeypatch):
    def install(*arguments, **options):
        runtime = FakeRuntime(*arguments, **options)
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        return runtime

    return install


@pytest.fixture(scope="module")
def quantized():
    pytest.importorskip("onnxruntime")
    return quantize_int8(FLOAT, {"image": IMAGES}, on_gpu=True)


@pytest.mark.parametrize(
    ("loading", "title"),
    [([TENSORRT, CUDA], "ONNX Runtime (TensorRT, CUDA)"), ([CUDA], "ONNX Runtime (CUDA)")],
)
@pytest.mark.parametrize("error", [None, "libnvinfer.so.10: cannot open shared object file"])
def test_the_fastest_that_loads_runs_and_never_the_cpu(install, loading, title, error):
    runtime = install([TENSORRT, CUDA], loading, error)
    assert OnnxRuntime(FLOAT, 1, on_gpu=True).title == title
    ((providers, entries),) = runtime.opened
    assert providers == [(name, {}) for name in loading]
    assert entries == {"session.disable_cpu_ep_fallback": "1"}
    assert OnnxRuntime.title == "ONNX Runtime"


def test_tensorrt_computes_a_quantized_model_in_int8(install, quantized):
    runtime = install([TENSORRT, CUDA], [TENSORRT, CUDA])
    OnnxRuntime(quantized, 1, on_gpu=True)
    (((_, tensorrt), (_, cuda)), _) = runtime.opened[0]
    assert tensorrt == {"trt_int8_enable": True, "trt_fp16_enable": True} and cuda == {}


def test_a_runtime_for_cpus_is_no_comparison(install):
    install([], [])
    with pytest.raises(MissingDependencyError, match=r"installed only on CPUs.*`pip install onnxruntime-gpu"):
        OnnxRuntime(FLOAT, 1, on_gpu=True)


@pytest.mark.parametrize(("error", "why"), [(None, "its libraries are missing"), ("no CUDA-capable device", None)])
def test_what_does_not_load_is_named(install, error, why):
    install([TENSORRT, CUDA], [], error)
    with pytest.raises(MissingDependencyError, match=rf"TensorRT: {why or error}; CUDA: {why or error}.*`pip install"):
        OnnxRuntime(FLOAT, 1, on_gpu=True)


def test_a_model_that_needs_the_cpu_is_refused(install):
    install([CUDA], [CUDA], unable=True)
    with pytest.raises(ModelError, match=r"ONNX Runtime \(CUDA\) cannot run the model: nodes are assigned to the CPU$"):
        OnnxRuntime(FLOAT, 1, on_gpu=True)


def test_the_installed_runtime_is_asked_in_earnest():
    runtime = pytest.importorskip("onnxruntime")
    if {TENSORRT, CUDA} & set(runtime.get_available_providers()):
        pytest.skip("this ONNX Runtime is one for GPUs")
    with pytest.raises(MissingDependencyError, match="onnxruntime-gpu"):
        OnnxRuntime(FLOAT, 1, on_gpu=True)


@pytest.mark.parametrize(
    ("engine", "code", "why"), [("onnxruntime", 5, "onnxruntime-gpu"), ("openvino", 4, "has no engine")]
)
def test_bench_asks_the_library_where_it_runs(monkeypatch, capsys, install, library, model_path, engine, code, why):
    install([], [])
    model = artifact.load(library, 1)
    model.manifest["target"]["gpus"] = ["sm_87"]
    monkeypatch.setattr(artifact, "load", lambda path, threads: model)
    assert cli.main(["bench", str(library), "--seconds", "0.1"]) == 0
    assert "one inference on the GPU" in capsys.readouterr().out
    assert cli.main(["bench", str(library), "--vs", engine, "--model", str(model_path)]) == code
    assert why in capsys.readouterr().err


def test_openvino_refuses():
    with pytest.raises(UnsupportedError, match="GPU, where OpenVINO has no engine"):
        OpenVino(FLOAT, 1, on_gpu=True)


def test_the_quantized_model_is_one_that_tensorrt_takes(quantized):
    assert is_quantized(quantized)
    graph = onnx.load_from_string(quantized).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zero_points = [arrays[node.input[2]] for node in graph.node if node.op_type.endswith("tizeLinear")]
    assert zero_points and all(array.dtype == np.int8 and not array.any() for array in zero_points)
    exact, rounded = (OnnxRuntime(model, 1).run({"image": IMAGES[:1]})["logits"] for model in (FLOAT, quantized))
    np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max())
