import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network import Network
from tvm.relax import op as R

from pumice.module import weights_of, with_weights
from pumice.passes.calibrate import Calibrate
from pumice.passes.correct_bias import CorrectBias, mean_output
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import find_layers
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.quantize import Quantize


def quantized(mod, samples, *keep_float):
    spec = QuantizeSpec(keep_float)
    return Quantize(spec)(Calibrate(samples, "minmax", spec)(mod))


def linear(bias):
    """Weights 127, 0.4, -0.4 and 0.6: at scale 1 they round to 127, 0, 0 and 1, errors 0, -0.4, 0.4 and 0.4."""
    net = Network()
    w = net.weight("fc.weight", np.array([[127], [0.4], [-0.4], [0.6]], np.float32))
    x = net.input("x", (1, 4))
    if not bias:
        return net.finish(y=net.linear("fc", x, 1, bias=False, weight=w))
    b = net.weight("fc.bias", np.array([5], np.float32))
    y = net.call("fc", R.matmul(x, w))
    return net.finish(y=net.call("fc.biased", R.add(y, b)))


SAMPLES = {"x": np.array([[0, 1, 0, 2], [255, 3, 2, 0]], np.float32)}  # means 127.5, 2, 1 and 1
SHIFT = 0.4 * 2 - 0.4 * 1 - 0.4 * 1


def test_known_by_hand():
    mod = linear(bias=True)
    corrected = CorrectBias(mod, SAMPLES)(quantized(mod, SAMPLES))
    np.testing.assert_allclose(weights_of(corrected)["fc.bias"], [5 + SHIFT], atol=1e-6)


def test_a_layer_without_bias_gets_one():
    mod = linear(bias=False)
    samples = {"x": np.array([[0, 1, 0, 0], [255, 3, 0, 0]], np.float32)}
    corrected = CorrectBias(mod, samples)(quantized(mod, samples))
    np.testing.assert_allclose(weights_of(corrected)["fc.bias"], [0.8], rtol=1e-6)
    before, after = Evaluator(quantized(mod, samples)), Evaluator(corrected)
    for i in range(2):
        sample = {"x": samples["x"][i : i + 1]}
        # A bias is rounded to the accumulator's unit, here 1 * 1.
        np.testing.assert_array_equal(after.run(sample)["y"], before.run(sample)["y"] + 1)


def test_twice_is_once():
    mod = linear(bias=True)
    samples = {"x": SAMPLES["x"][:1]}
    once = CorrectBias(mod, samples)(quantized(mod, samples))
    twice = CorrectBias(mod, samples)(once)
    np.testing.assert_array_equal(weights_of(twice)["fc.bias"], weights_of(once)["fc.bias"])


def test_float_layers_and_pruned_channels_stay():
    net = Network()
    x = net.relu("r", net.conv("a", net.input("x", (1, 4, 5, 5)), 8, 3, padding=1))
    mod = net.finish(y=net.conv("b", x, 4))
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    weights["a.weight"][2] = 0
    mod = with_weights(mod, weights)
    samples = {"x": np.random.default_rng(0).normal(0, 1, (3, 4, 5, 5)).astype(np.float32)}
    before = quantized(mod, samples, "b")
    after = weights_of(CorrectBias(mod, samples)(before))
    np.testing.assert_array_equal(after["b.bias"], weights["b.bias"])
    assert after["a.bias"].ravel()[2] == weights["a.bias"].ravel()[2]
    assert np.any(after["a.bias"] != weights["a.bias"])
    np.testing.assert_array_equal(after["a.weight"], weights_of(before)["a.weight"])


def test_the_mean_of_the_output_comes_back():
    """Only the input's own rounding, even and small, is left in the mean."""
    net = Network()
    mod = net.finish(y=net.conv("a", net.input("x", (1, 16, 7, 7)), 8, 3, stride=2, padding=1))
    samples = {"x": np.random.default_rng(0).uniform(0, 1, (16, 16, 7, 7)).astype(np.float32)}
    int8 = quantized(mod, samples)

    def means(module):
        evaluator = Evaluator(module)
        outputs = [evaluator.run({"x": samples["x"][i : i + 1]})["y"] for i in range(16)]
        return np.concatenate(outputs).mean((0, 2, 3))

    before = np.abs(means(int8) - means(mod)).max()
    after = np.abs(means(CorrectBias(mod, samples)(int8)) - means(mod)).max()
    assert after < before / 5


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.sampled_from([1, 2, 4]), st.data()
)
def test_mean_output_is_the_mean_of_the_convolution(stride, kernel, padding, dilation, groups, data):
    net = Network()
    x = net.input("x", (1, 4, 6, 7))
    w = net.weight("a.weight", net.rng.normal(0, 1, (8, 4 // groups, kernel, kernel)).astype(np.float32))
    bottom = data.draw(st.integers(0, 2))
    pads = (padding, 1, bottom, 0)
    y = net.call("a", R.nn.conv2d(x, w, strides=stride, padding=pads, dilation=dilation, groups=groups))
    (layer,) = find_layers(net.finish(y=y))
    image = net.rng.normal(0, 1, (1, 4, 6, 7))
    weight = net.weights[w].astype(np.float64)
    np.testing.assert_allclose(
        mean_output(layer, weight, image), _by_loops(image, weight, stride, pads, dilation, groups)
    )


def _by_loops(image, weight, stride, pads, dilation, groups):
    padded = np.pad(image, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    outputs, inputs, size, _ = weight.shape
    reach = dilation * (size - 1) + 1
    means = []
    for n in range(outputs):
        first = n // (outputs // groups) * inputs
        values = [
            (padded[0, first : first + inputs, y : y + reach : dilation, x : x + reach : dilation] * weight[n]).sum()
            for y in range(0, padded.shape[2] - reach + 1, stride)
            for x in range(0, padded.shape[3] - reach + 1, stride)
        ]
        means.append(np.mean(values))
    return means


@pytest.mark.parametrize("rows", [1, 5])
def test_mean_output_of_a_linear_layer(rows):
    net = Network()
    (layer,) = find_layers(net.finish(y=net.linear("fc", net.input("x", (2, rows, 6)), 3, bias=False)))
    data, weight = net.rng.normal(0, 1, (2, rows, 6)), net.rng.normal(0, 1, (6, 3))
    np.testing.assert_allclose(mean_output(layer, weight, data), (data @ weight).mean((0, 1)))


def test_sequences_are_left_as_they_are():
    net = Network()
    w = net.weight("fc.weight", np.array([[127], [0.4], [-0.4], [0.6]], np.float32))
    b = net.weight("fc.bias", np.array([5], np.float32))
    y = net.call("fc", R.matmul(net.input("x", (1, 2, 4)), w))
    mod = net.finish(y=net.call("fc.biased", R.add(y, b)))
    samples = {"x": np.array([[[0, 1, 0, 2], [255, 3, 2, 0]]], np.float32)}
    corrected = CorrectBias(mod, samples)(quantized(mod, samples))
    np.testing.assert_array_equal(weights_of(corrected)["fc.bias"], [5])
