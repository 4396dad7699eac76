import numpy as np
import pytest
from network import Network, residual_network
from tvm.relax import op as R

from pumice.module import layers_of, weights_of, with_weights
from pumice.passes.calibrate import Calibrate, ranges_of
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import find_layers
from pumice.passes.prune import Prune
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.quantize import Quantize
from pumice.passes.sparsity import RecordLayers
from pumice.passes.split_errors import SplitErrors


def two_linear_layers():
    net = Network()
    y = net.relu("y", net.linear("a", net.input("x", (1, 4, 12)), 16))
    return RecordLayers()(net.finish(z=net.linear("b", y, 6)))


def samples(mod, count=8, seed=1):
    rng = np.random.default_rng(seed)
    (var,) = Dataflow(mod).inputs
    return {var.name: rng.normal(0, 1, (count, *[int(d) for d in list(var.ty.shape)[1:]])).astype(np.float32)}


def round_weight(w):
    """Each column of ``[K, N]`` to 255 levels."""
    scale = np.abs(w).max(0) / 127
    return np.rint(w / scale) * scale


def round_tensor(x, affine):
    return (np.clip(np.rint(x / affine.scale) + affine.zero_point, 0, 255) - affine.zero_point) * affine.scale


def energy(x):
    return float(np.square(x).sum())


def test_pruning_by_hand():
    mod = two_linear_layers()
    given = samples(mod)
    pruned = Prune("magnitude:unstructured:0.5")(mod)
    noise = {name: r.noise for name, r in layers_of(SplitErrors(mod, given)(pruned)).items()}
    dense, holes = weights_of(mod), weights_of(pruned)
    x = given["x"].reshape(-1, 12)
    y = np.maximum(x @ dense["a.weight"] + dense["a.bias"], 0)
    for name, inputs in (("a", x), ("b", y)):
        w, p = dense[f"{name}.weight"], holes[f"{name}.weight"]
        assert set(noise[name]) == {"pruning"}
        assert noise[name]["pruning"] == pytest.approx(energy(inputs @ (w - p)) / energy(inputs @ w), rel=1e-4)


def test_rounding_by_hand():
    mod = two_linear_layers()
    given = samples(mod)
    calibrated = Calibrate(given, "minmax")(mod)
    ranges = ranges_of(calibrated)
    noise = {name: r.noise for name, r in layers_of(SplitErrors(mod, given)(Quantize()(calibrated))).items()}
    weights = weights_of(mod)
    x = given["x"].reshape(-1, 12)
    y = np.maximum(x @ weights["a.weight"] + weights["a.bias"], 0)
    for name, inputs, tensor in (("a", x, "x"), ("b", y, "y")):
        w = weights[f"{name}.weight"]
        q, error = round_weight(w), inputs - round_tensor(inputs, ranges[tensor])
        assert noise[name]["weights"] == pytest.approx(energy(inputs @ (w - q)) / energy(inputs @ w), rel=1e-2)
        assert noise[name]["activations"] == pytest.approx(energy(error @ q) / energy(inputs @ w), rel=1e-2)


@pytest.mark.parametrize("name", ["stem", "a1", "b2", "fc"])
def test_the_parts_add_up_to_what_the_layer_alone_does(name):
    """Against the compiled network with this layer alone in int8, observed behind it.

    Not for layers behind a residual add, which rounds its other operand too.
    """
    mod = RecordLayers()(residual_network())
    given = samples(mod)
    calibrated = Calibrate(given, "minmax")(mod)
    noise = layers_of(SplitErrors(mod, given)(Quantize()(calibrated)))[name].noise
    names = [layer.name for layer in find_layers(mod)]
    spec = QuantizeSpec(tuple(other for other in names if other != name))
    alone = Quantize(spec)(Calibrate(given, "minmax", spec)(mod))
    exact, rounded = (
        Evaluator(one, [layer.var for layer in find_layers(one) if layer.name == name]) for one in (mod, alone)
    )
    signal = error = 0.0
    for image in given["image"]:
        (a,), (b,) = (each.observe({"image": image[None]}) for each in (exact, rounded))
        signal, error = signal + energy(a), error + energy(a - b)
    assert sum(noise.values()) == pytest.approx(error / signal, rel=0.15)


def test_grouped_strided_and_dilated_convolutions():
    net = Network()
    y = net.relu("y", net.conv("a", net.input("image", (1, 4, 9, 9)), 8, 3, stride=2, padding=1))
    mod = RecordLayers()(net.finish(z=net.conv("b", y, 12, 3, padding=2, groups=4)))
    given = samples(mod)
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    weights["b.weight"][:, 1] = 0
    holes = with_weights(mod, weights)
    (var,) = [layer.var for layer in find_layers(mod) if layer.name == "b"]
    outputs = [Evaluator(one, [var]) for one in (mod, holes)]
    signal = error = 0.0
    for image in given["image"]:
        (a,), (b,) = (each.observe({"image": image[None]}) for each in outputs)
        signal, error = signal + energy(a), error + energy(a - b)
    noise = layers_of(SplitErrors(mod, given)(holes))["b"].noise
    assert noise["pruning"] == pytest.approx(error / signal, rel=1e-4)


def test_both_steps_are_kept_and_what_did_not_change_has_no_noise():
    mod = two_linear_layers()
    given = samples(mod)
    pruned = SplitErrors(mod, given)(Prune("magnitude:unstructured:0.5:keep=b")(mod))
    quantized = Quantize(QuantizeSpec(("a",)))(Calibrate(given, "minmax", QuantizeSpec(("a",)))(pruned))
    records = layers_of(SplitErrors(pruned, given)(quantized))
    assert set(records["a"].noise) == {"pruning"}
    assert set(records["b"].noise) == {"weights", "activations"}


def noted(mod, given, *passes):
    for one in passes:
        mod = one(mod)
    return {name: [n for n in r.notes if "its own error" in n] for name, r in layers_of(mod).items()}


def test_pruning_names_what_undoes_it():
    mod = two_linear_layers()
    given = samples(mod)
    notes = noted(mod, given, Prune("magnitude:unstructured:0.9:keep=b"), SplitErrors(mod, given))
    assert "dB of its output, most of it from pruning: keep=a or a lower amount" in notes["a"][0]
    assert not notes["b"]


def test_activation_outliers_name_what_undoes_them():
    net = Network()
    x = net.norm("norm", net.input("x", (1, 8, 16)))
    gelu = net.call("gelu", R.nn.gelu(net.linear("up", x, 16)))
    mod = RecordLayers()(net.finish(z=net.linear("down", gelu, 6)))
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    weights["norm.weight"][3] *= 100
    weights["up.weight"][3] = 1e-4
    weights["down.weight"][:, :] = np.round(weights["down.weight"] * 8) / 8
    mod = with_weights(mod, weights)
    given = samples(mod)
    notes = noted(mod, given, Calibrate(given, "minmax"), Quantize(), SplitErrors(mod, given))
    assert notes["up"][0].endswith("from rounding its input: --smooth lessens it, --keep-float up undoes it")
    assert not notes["down"]  # 1 % of noise is not reached
