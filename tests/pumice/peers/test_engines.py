"""The engines that Pumice is compared with: that they compute the model, say where time goes, and stay silent."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from tiny import tiny_onnx

from pumice.errors import MissingDependencyError, ModelError
from pumice.peers import PEERS, OnnxRuntime, quantize_int8

IMAGES = np.random.default_rng(1).random((4, 1, 8, 8), dtype=np.float32)


@pytest.fixture(params=PEERS)
def engine(request):
    if (
        importlib.util.find_spec(request.param) is None
    ):  # not importorskip: OpenVINO's plain import reports to its makers
        pytest.skip(f"{request.param} is not installed")
    return PEERS[request.param]


@pytest.fixture(scope="module")
def quantized():
    pytest.importorskip("onnxruntime")
    return quantize_int8(tiny_onnx(batch=1).SerializeToString(), {"image": IMAGES})


def test_float_and_int8_give_what_onnx_runtime_gives(engine, quantized):
    feed = {"image": IMAGES[:1]}
    exact = OnnxRuntime(tiny_onnx(batch=1).SerializeToString(), 1).run(feed)["logits"]
    np.testing.assert_allclose(
        engine(tiny_onnx(batch=1).SerializeToString(), 1).run(feed)["logits"], exact, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(engine(quantized, 1).run(feed)["logits"], exact, atol=0.1 * np.abs(exact).max())


def test_outputs_are_not_overwritten_by_the_next_run(engine):
    peer = engine(tiny_onnx(batch=1).SerializeToString(), 1)
    first = peer.run({"image": IMAGES[:1]})["logits"]
    kept = first.copy()
    peer.infer({"image": IMAGES[1:2]})
    np.testing.assert_array_equal(first, kept)


def test_a_broken_model_is_refused_with_the_engines_name(engine):
    with pytest.raises(ModelError, match=engine.title):
        engine(tiny_onnx(batch=1).SerializeToString().replace(b"Relu", b"Relx"), 1)


def test_a_missing_package_is_named(monkeypatch, engine):
    package = engine.title.replace(" ", "").lower()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {package}"):
        engine(tiny_onnx(batch=1).SerializeToString(), 1)


def test_openvino_never_loads_its_telemetry(tmp_path):
    if importlib.util.find_spec("openvino_telemetry") is None:
        pytest.skip("openvino-telemetry is not installed")
    script = """
import sys
from pumice.peers.openvino import import_openvino
openvino = import_openvino()
assert openvino.Core
assert "openvino_telemetry" not in sys.modules
import openvino_telemetry  # whoever wants it still finds it
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("CI", None)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []  # where it would keep its identity
