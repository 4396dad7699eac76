"""What is exported, run by ONNX Runtime and read back, against Pumice's own kernels."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from coupled import NETWORKS
from network import residual_network
from onnx import numpy_helper
from running import random_feed, run_compiled
from tiny import tiny_onnx

from pumice.driver import compile_model
from pumice.errors import UnsupportedError, UsageError
from pumice.export import export_onnx, write_onnx
from pumice.frontend import read_model
from pumice.module import inputs_of, layers_of, output_names_of, weights_of, with_source
from pumice.passes import Calibrate, Prune, Quantize, RecordLayers, SimplifyModel
from pumice.passes.layers import find_layers


def elsewhere(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def quantized(mod, seed=5):
    return Quantize()(Calibrate(random_feed(mod, 8, seed), "minmax")(RecordLayers()(mod)))


@pytest.mark.parametrize("name", NETWORKS)
def test_float_networks_give_the_same(name):
    """float32 in another order of summation: 1e-4 of the largest output."""
    mod = NETWORKS[name]()
    for theirs, ours in zip(
        elsewhere(export_onnx(mod), random_feed(mod)), run_compiled(mod, random_feed(mod)), strict=True
    ):
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_int8_networks_differ_by_less_than_rounding_does(name):
    """Runtimes requantize a sum that lies between two integers to one or the other, so single values move a step.

    That is far less than what rounding did to the network: its noise energy is below a tenth of int8's against float.
    """
    mod = NETWORKS[name]()
    int8 = quantized(mod)
    inputs = random_feed(mod)
    outputs = zip(
        elsewhere(export_onnx(int8), inputs), run_compiled(int8, inputs), run_compiled(mod, inputs), strict=True
    )
    for theirs, ours, exact in outputs:
        noise = np.square(ours - exact).sum()
        assert np.square(theirs - ours).sum() <= 0.1 * noise + 1e-6 * np.square(exact).sum()


def test_names_zeros_and_patterns_survive():
    pruned = Prune("magnitude:1x4:0.5")(residual_network())
    int8 = quantized(pruned)
    model = export_onnx(int8, {"prune": ["magnitude:1x4:0.5"]})
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for layer in find_layers(int8):
        weight = weights_of(int8)[layer.weight.name]
        assert stored[layer.weight.name].dtype == np.int8
        assert (stored[layer.weight.name] == 0).sum() == (weight == 0).sum()
    assert [value.name for value in model.graph.input] == [var.name for var in inputs_of(int8)]
    assert [value.name for value in model.graph.output] == output_names_of(int8)
    assert model.producer_name == "pumice"
    properties = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert properties["pumice.options"] == {"prune": ["magnitude:1x4:0.5"]}
    assert [layer["name"] for layer in properties["pumice.layers"]] == list(layers_of(int8))


def test_read_back_it_is_the_same_network():
    int8 = quantized(Prune("magnitude:1x4:0.5")(residual_network()))
    back = RecordLayers()(SimplifyModel()(read_model(export_onnx(int8), None)))
    for before, after in zip(layers_of(RecordLayers()(int8)).values(), layers_of(back).values(), strict=True):
        assert (after.name, after.pattern, after.sparsity) == (before.name, before.pattern, before.sparsity)
    again = Quantize()(back)
    assert all(layer.dtype == "int8" for layer in layers_of(again).values())
    for ours, theirs in zip(run_compiled(int8, random_feed(int8)), run_compiled(again, random_feed(int8)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_compile_writes_it_beside_the_library(tmp_path):
    model, path = tiny_onnx(batch=1), tmp_path / "out.onnx"
    images = np.random.default_rng(0).standard_normal((8, 1, 8, 8)).astype(np.float32)
    artifact = compile_model(model, calibration={"image": images}, prune="magnitude:1x4:0.5", emit_onnx=path)
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded)
    theirs, ours = elsewhere(loaded, {"image": images[:1]})[0], artifact(image=images[:1])["logits"]
    np.testing.assert_allclose(theirs, ours, atol=0.02 * np.abs(ours).max())


def test_a_path_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        write_onnx(residual_network(), tmp_path / "nowhere" / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_a_form_is_refused_by_name(monkeypatch):
    from pumice.export import onnx_model

    monkeypatch.delitem(onnx_model.OPERATORS, "nn.max_pool2d")
    with pytest.raises(UnsupportedError, match=r"network\.onnx: .*max_pool2d"):
        export_onnx(with_source(residual_network(), "network.onnx"))
