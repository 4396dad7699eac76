import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")

from bench import layers
from bench.layer_shapes import LAYERS, LayerShape
from pumice.bench import Timing
from pumice.peers import OnnxRuntime


@pytest.fixture
def run():
    """Dense: 10 us, a peer 8 us; 1x4 blocks 16, 4 and 2 us at 0, 50 and 90 %."""
    times = {"Peer": 8.0, "Pumice dense": 10.0, "1x4 0": 16.0, "1x4 50": 4.0, "1x4 90": 2.0}
    facts = {
        "Peer": {"family": "peer", "pattern": "dense", "zeros": 0.0},
        "Pumice dense": {"family": "pumice", "pattern": "dense", "zeros": 0.0, "nbytes": 100},
        **{
            f"1x4 {zeros}": {"family": "pumice", "pattern": "1x4", "zeros": zeros / 100, "nbytes": 50}
            for zeros in (0, 50, 90)
        },
    }
    timings = [Timing(name, us / 1e3, us / 1e3, us / 1e3, 10, us / 8) for name, us in times.items()]
    return layers.entry("a layer", 1, 1_000_000, timings, facts)


def test_everything_is_compared_with_the_best_dense(run):
    assert run["best_dense"] == "Peer"
    speedups = {kernel["name"]: kernel["speedup"] for kernel in run["kernels"]}
    assert speedups == {"Peer": 1, "Pumice dense": 0.8, "1x4 0": 0.5, "1x4 50": 2, "1x4 90": 4}
    assert run["break_even"] == {"1x4": pytest.approx(0.5 * 8 / 12)}


def test_operations_a_second_are_those_really_done(run):
    done = {kernel["name"]: kernel["gops"] for kernel in run["kernels"]}
    assert done["Pumice dense"] == pytest.approx(2e6 / 10e-6 / 1e9)
    assert done["1x4 90"] == pytest.approx(2e5 / 2e-6 / 1e9)


def test_tables(run):
    assert "| Pumice dense | 10.00" in layers.details(run)
    cells = [cell.strip() for cell in layers.summary([run]).splitlines()[2].strip("|").split("|")]
    assert cells == ["a layer", "1", "Peer", "8.00", "0.80", "4.00", "", "33% zero", "never"]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_weight_has_the_zeros_that_were_asked_for(rows):
    weight = LayerShape(64, 32, 9, 3).weight(0.7, rows)
    assert weight.shape == (32, 64, 3, 3)
    lists = weight.reshape(32 // rows, rows, 16, 4, 9).any(axis=(1, 3))
    assert lists.mean() == pytest.approx(0.3, abs=1 / lists.size)
    assert (weight != 0).mean() == pytest.approx(0.3, abs=1 / lists.size)


@pytest.mark.parametrize("shape", [LayerShape(16, 8, 4, 3), LayerShape(16, 8, 5)], ids=lambda shape: shape.name)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_model_of_a_layer_computes_it(shape, channels_last):
    weight = shape.weight()
    model = shape.model(weight, channels_last)
    onnx.checker.check_model(model)
    x = np.full(shape.plane(16, channels_last), 228, np.uint8)  # 2.0 everywhere
    y = OnnxRuntime(model.SerializeToString(), 1).run({"x": x})["y"]
    assert y.shape == shape.plane(8, channels_last)
    if shape.kernel is None:
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        exact = 2.0 * 0.01 * weight[:, :, 0, 0].sum(1, dtype=np.int64) + constants["bias"] * 2e-4
        rounded = np.clip(np.rint(exact / constants["y_scale"]) + 128, 0, 255)
        assert np.abs(y - rounded).max() <= 1


def test_names_are_unique_and_macs_count():
    assert len(LAYERS) == 9
    assert LAYERS["conv 3x3, 28 x 28, 128 -> 128"].macs == 28 * 28 * 9 * 128 * 128


@pytest.mark.slow
def test_a_layer_end_to_end():
    job = layers.Job("linear 1 x 1024 -> 1024", 1, (0.0, 0.9), ("onnxruntime",), "native", 0.1)
    run = layers.measure_layer(job)
    assert [k["name"] for k in run["kernels"]] == [
        "ONNX Runtime",
        "Pumice dense",
        *(f"Pumice {form}, {zeros}% zero" for form in ("1x4", "4x4") for zeros in (0, 90)),
    ]
    assert all(k["median_ms"] > 0 for k in run["kernels"])
    forms = {k["pattern"]: k["nbytes"] for k in run["kernels"] if k["family"] == "pumice"}
    assert forms["1x4"] < forms["dense"] / 2  # sparse was forced, and keeps only what is there
