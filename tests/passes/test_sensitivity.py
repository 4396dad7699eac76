import numpy as np
import pytest
from network import Network, residual_network

from pumice.module import weights_of
from pumice.passes.calibrate import Calibrate, ranges_of
from pumice.passes.correct_bias import CorrectBias
from pumice.passes.dataflow import Dataflow
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import find_layers
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.quantize import Quantize
from pumice.passes.rewriting import shape_of
from pumice.passes.sensitivity import output_noise


def samples(mod, count=6, seed=1):
    rng = np.random.default_rng(seed)
    return {var.name: rng.normal(0, 1, (count, *shape_of(var)[1:])).astype(np.float32) for var in Dataflow(mod).inputs}


def quantized(mod, given, spec=None, correct=False):
    after = Quantize(spec)(Calibrate(given, "minmax", spec)(mod))
    return CorrectBias(mod, given)(after) if correct else after


def round_tensor(x, affine):
    return (np.clip(np.rint(x / affine.scale) + affine.zero_point, 0, 255) - affine.zero_point) * affine.scale


def round_weight(w):
    """Each column of ``[K, N]`` to 255 levels."""
    scale = np.abs(w).max(0) / 127
    return np.rint(w / scale) * scale


def energy(x):
    return float(np.square(x, dtype=np.float64).sum())


def test_two_layers_by_hand():
    net = Network()
    y = net.relu("y", net.linear("a", net.input("x", (1, 4, 12)), 16))
    mod = net.finish(z=net.linear("b", y, 6))
    given = samples(mod)
    ranges, w = ranges_of(Calibrate(given, "minmax")(mod)), weights_of(mod)

    def run(a, b):
        x = given["x"].reshape(-1, 12)
        x = round_tensor(x, ranges["x"]) if a else x
        y = np.maximum(x @ (round_weight(w["a.weight"]) if a else w["a.weight"]) + w["a.bias"], 0)
        y = round_tensor(y, ranges["y"]) if b else y
        return y @ (round_weight(w["b.weight"]) if b else w["b.weight"]) + w["b.bias"]

    exact = run(False, False)
    noise = output_noise(mod, quantized(mod, given), given)
    assert noise["a"] == pytest.approx(energy(run(True, False) - exact) / energy(exact), rel=2e-2)
    assert noise["b"] == pytest.approx(energy(run(False, True) - exact) / energy(exact), rel=2e-2)


@pytest.mark.parametrize("correct", [False, True])
def test_one_layer_in_int8_measured_by_compiling_it_so(correct):
    """The stem, which alone rounds nothing but its own input and weight."""
    mod = residual_network()
    given = samples(mod)
    noise = output_noise(mod, quantized(mod, given, correct=correct), given)
    assert list(noise) == [layer.name for layer in find_layers(mod)]
    spec = QuantizeSpec(tuple(layer.name for layer in find_layers(mod) if layer.name != "stem"))
    exact, rounded = Evaluator(mod), Evaluator(quantized(mod, given, spec, correct))
    signal = error = 0.0
    for image in given["image"]:
        (a,), (b,) = (each.run({"image": image[None]}).values() for each in (exact, rounded))
        signal, error = signal + energy(a), error + energy(a - b)
    assert noise["stem"] == pytest.approx(error / signal, rel=0.02)


def test_the_bias_is_the_corrected_one():
    mod = residual_network()
    given = samples(mod)
    after = quantized(mod, given, correct=True)
    (layer,) = [layer for layer in find_layers(mod) if layer.name == "fc"]
    evaluator = Evaluator(mod, [layer.data])
    x = np.concatenate([evaluator.observe({"image": image[None]})[0] for image in given["image"]])
    rounded = round_tensor(x, ranges_of(Calibrate(given, "minmax")(mod))[layer.data.name])
    before, corrected = weights_of(mod), weights_of(after)
    exact = x @ before["fc.weight"] + before["fc.bias"]
    error = exact - (rounded @ round_weight(before["fc.weight"]) + corrected["fc.bias"])
    assert np.abs(corrected["fc.bias"] - before["fc.bias"]).max() > 1e-2
    assert output_noise(mod, after, given)["fc"] == pytest.approx(energy(error) / energy(exact), rel=1e-3)


def test_noises_add_up_to_the_whole():
    mod = residual_network()
    given = samples(mod, 16)
    after = quantized(mod, given)
    exact, rounded = Evaluator(mod), Evaluator(after)
    signal = error = 0.0
    for image in given["image"]:
        (a,), (b,) = (each.run({"image": image[None]}).values() for each in (exact, rounded))
        signal, error = signal + energy(a), error + energy(a - b)
    total = sum(output_noise(mod, after, given).values())
    assert 0.4 * error / signal < total < 2 * error / signal


def test_progress_and_layers_that_stay_float():
    mod = residual_network()
    given = samples(mod, 3)
    calls = []
    after = quantized(mod, given, QuantizeSpec(("stem", "b*")))
    noise = output_noise(mod, after, given, limit=2, progress=lambda *call: calls.append(call))
    assert list(noise) == ["a1", "a2", "fc"]
    assert calls == [(i, 6) for i in range(1, 7)]
    assert output_noise(mod, mod, given) == {}


def test_padding_tokens_do_not_count():
    net = Network()
    x = net.input("x", (1, 4, 12))
    net.input("attention_mask", (1, 4), "int64")
    mod = net.finish(z=net.linear("a", x, 16))
    given = samples(mod)
    given["attention_mask"] = np.array([[1, 1, 0, 0]] * 6)
    spoilt = {**given, "x": given["x"].copy()}
    after = quantized(mod, given)
    spoilt["x"][:, 2:] *= 50
    assert output_noise(mod, after, spoilt) == output_noise(mod, after, given)
