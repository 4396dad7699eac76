import json

import numpy as np
import pytest
from network import Network, residual_network

from pumice.module import layers_of, weights_of, with_weights
from pumice.passes.calibrate import Calibrate
from pumice.passes.layer_error import RecordLayerErrors, decibels
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.quantize import Quantize


@pytest.mark.parametrize(
    ("signal", "noise", "expected"), [(100, 1, 20), (1, 100, -20), (1, 0, 150), (0, 0, 150), (0, 1, -150), (1, 1, 0)]
)
def test_decibels(signal, noise, expected):
    assert decibels(signal, noise) == pytest.approx(expected)


def test_every_layer_of_a_quantized_network():
    mod = residual_network()
    samples = {"image": np.random.default_rng(0).normal(0, 1, (16, 4, 12, 12)).astype(np.float32)}
    after = Quantize()(Calibrate(samples, "minmax")(mod))
    layers = layers_of(RecordLayerErrors(mod, samples)(after))
    assert len(layers) == 7
    for layer in layers.values():  # a byte's 256 steps over about 8 deviations: 40 dB, less what piles up
        assert 22 < layer.snr_db < 60
    json.dumps([layer.to_json() for layer in layers.values()], allow_nan=False)


def test_the_point_is_after_bias_and_activation():
    """With weights changed by a known factor the noise is known too."""
    net = Network()
    x = net.relu("r", net.linear("up", net.input("x", (4, 8)), 8))
    mod = net.finish(y=net.linear("down", x, 8, bias=False))
    samples = {"x": np.random.default_rng(0).normal(0, 1, (8, 8)).astype(np.float32)}
    after = Quantize()(Calibrate(samples, "minmax")(mod))
    scaled = {n: w * 1.1 if n == "down.weight.scale" else w for n, w in weights_of(after).items()}
    layers = layers_of(RecordLayerErrors(mod, samples, limit=1)(with_weights(after, scaled)))
    assert layers["down"].snr_db == pytest.approx(20, abs=1.5)
    assert layers["up"].snr_db > 35


def test_a_module_without_records_stays_as_it_is():
    mod = residual_network()
    samples = {"image": np.ones((1, 4, 12, 12), np.float32)}
    assert layers_of(RecordLayerErrors(mod, samples)(mod)) == {}


def test_a_module_that_was_not_quantized_has_no_error():
    mod = residual_network()
    samples = {"image": np.ones((1, 4, 12, 12), np.float32)}
    everything_float = Quantize(QuantizeSpec(keep_float=("*",)))(mod)
    layers = layers_of(RecordLayerErrors(mod, samples)(everything_float))
    assert {layer.snr_db for layer in layers.values()} == {150.0}
