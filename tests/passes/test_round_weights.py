from itertools import product

import numpy as np
import pytest
from network import Network, residual_network

from pumice.errors import ModelError
from pumice.module import layers_of, weights_of
from pumice.passes import Calibrate, CorrectBias, Prune, Quantize, QuantizeSpec, RecordLayers
from pumice.passes.layers import find_layers
from pumice.passes.quantization_plan import quantize_rows, symmetric_scale, weight_scales_of
from pumice.passes.round_weights import RoundWeights
from pumice.passes.statistics import input_moments, output_error


def images(count=4, shape=(4, 12, 12), seed=0):
    return {"image": np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)}


def nearest(layer, weight):
    scale = symmetric_scale(layer, weight)
    shape = [1] * weight.ndim
    shape[layer.channel_axis] = -1
    return quantize_rows(layer, weight, scale) * scale.reshape(shape)


def test_weights_lie_on_the_grid_and_quantize_finds_the_very_integers():
    mod = Prune("magnitude:unstructured:0.4")(residual_network())
    samples = images()
    rounded = RoundWeights(samples)(mod)
    scales = weight_scales_of(rounded)
    quantized = Quantize()(Calibrate(samples, "minmax")(rounded))
    assert not weight_scales_of(quantized)  # they hold for the float weights only
    layers = find_layers(mod)
    assert set(scales) == {layer.weight.name for layer in layers}
    for layer in layers:
        name = layer.weight.name
        scale = symmetric_scale(layer, weights_of(mod)[name])
        np.testing.assert_array_equal(scales[name], scale)
        whole = weights_of(quantized)[name]
        assert whole.dtype == np.int8
        rows = layer.to_rows(whole).astype(np.float32) * scale[:, None, None]
        np.testing.assert_array_equal(layer.to_rows(weights_of(rounded)[name]), rows)
        assert (whole[weights_of(mod)[name] == 0] == 0).all()


def test_every_output_is_nearer_than_with_nearest_integers():
    mod, samples = residual_network(), images(8)
    rounded = RoundWeights(samples)(mod)
    moments = input_moments(mod, samples)
    for layer in find_layers(mod):
        before, after = (weights_of(m)[layer.weight.name] for m in (mod, rounded))
        rows = [layer.to_rows(weight) for weight in (before, after, nearest(layer, before))]
        assert output_error(rows[0], rows[1], moments[layer.name]) < output_error(rows[0], rows[2], moments[layer.name])


def test_two_layers_by_brute_force():
    """All neighbours of each row's integers tried: what GPTQ finds is on average within a third of the best."""
    net = Network(1)
    x = net.input("x", (1, 3))
    mod = net.finish(y=net.linear("b", net.relu("r", net.linear("a", x, 4)), 5))
    draw = np.random.default_rng(2)
    shared = draw.standard_normal((60, 1)) * np.array([1.0, 2.0, -1.0])  # what one column does wrong, others can undo
    samples = {"x": (shared + 0.3 * draw.standard_normal((60, 3))).astype(np.float32)}
    rounded = RoundWeights(samples)(mod)
    first = find_layers(mod)[0]
    gram = input_moments(mod, samples)["a"].gram[0]
    rows, found = (first.to_rows(weights_of(m)["a.weight"])[:, 0].astype(np.float64) for m in (mod, rounded))
    scale = np.abs(rows).max(1) / 127
    best = reached = plain = 0.0
    for row, steps, got in zip(rows, scale, found, strict=True):
        tries = [np.rint(row / steps) + np.array(move) for move in product((-1, 0, 1), repeat=3)]
        losses = [(row - t * steps) @ gram @ (row - t * steps) for t in tries if np.abs(t).max() <= 127]
        best += min(losses)
        reached += (row - got) @ gram @ (row - got)
        plain += (row - np.rint(row / steps) * steps) @ gram @ (row - np.rint(row / steps) * steps)
    assert best * (1 - 1e-3) <= reached <= plain  # scales are float32
    assert reached - best <= (plain - best) / 2


def test_layers_kept_float_stay_as_they_are():
    mod, samples = residual_network(), images()
    rounded = RoundWeights(samples, QuantizeSpec(("stem", "fc")))(mod)
    for name in ("stem.weight", "fc.weight"):
        np.testing.assert_array_equal(weights_of(rounded)[name], weights_of(mod)[name])
        assert name not in weight_scales_of(rounded)
    quantized = Quantize(QuantizeSpec(("stem", "fc")))(
        Calibrate(samples, "minmax", QuantizeSpec(("stem", "fc")))(rounded)
    )
    assert weights_of(quantized)["stem.weight"].dtype == np.float32


def test_a_shared_weight_is_rounded_to_nearest_and_says_so():
    net = Network()
    x = net.input("x", (1, 4))
    w = net.weight("fc.weight", net.rng.standard_normal((4, 4)).astype(np.float32))
    hidden = net.linear("one", x, 4, bias=False, weight=w)
    mod = net.finish(y=net.linear("two", hidden, 4, bias=False, weight=w))
    rounded = RoundWeights({"x": np.ones((3, 4), np.float32)})(RecordLayers()(mod))
    np.testing.assert_array_equal(weights_of(rounded)["fc.weight"], weights_of(mod)["fc.weight"])
    assert layers_of(rounded)["fc"].notes == ["rounded to nearest: several layers share its weight"]


def test_bias_correction_goes_on_from_it():
    mod, samples = residual_network(), images()
    quantized = Quantize()(Calibrate(samples, "minmax")(RoundWeights(samples)(mod)))
    corrected = CorrectBias(mod, samples)(quantized)
    assert weights_of(corrected)["stem.weight"].dtype == np.int8


def test_samples_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="no array for input 'image'"):
        RoundWeights({"picture": np.zeros((1, 4, 12, 12), np.float32)})(residual_network())
