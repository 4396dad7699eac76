"""The methods that look at calibration data, through the pass."""

import numpy as np
import pytest
from network import Network, residual_network

from pumice.errors import UsageError
from pumice.module import layers_of, weights_of
from pumice.passes import Prune, RecordLayers
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import find_layers
from pumice.passes.prune_rows import prune_rows
from pumice.passes.prune_spec import parse_prune
from pumice.passes.statistics import input_moments, output_error

IMAGES = {"image": np.random.default_rng(0).standard_normal((6, 4, 12, 12)).astype(np.float32)}


def two_layers():
    """Correlated inputs of uneven size, so that what is pruned can be made up for."""
    net = Network(3)
    x = net.input("x", (1, 8))
    mod = net.finish(y=net.linear("b", net.relu("r", net.linear("a", x, 8)), 4))
    draw = np.random.default_rng(4)
    inputs = draw.standard_normal((80, 3)) @ draw.standard_normal((3, 8)) + 0.2 * draw.standard_normal((80, 8))
    return mod, {"x": (inputs * np.exp(draw.standard_normal(8))).astype(np.float32)}


def outputs(mod, samples):
    evaluator = Evaluator(mod)
    (name,) = samples
    return np.concatenate([evaluator.run({name: sample[None]})["y"] for sample in samples[name]])


@pytest.mark.parametrize("method", ["wanda:1x4:0.5", "sparsegpt:2:4", "sparsegpt:1x4:0.5:refits=10"])
def test_the_first_layer_is_pruned_on_its_input_and_the_second_on_what_comes_through(method):
    """By hand: the first layer's moments from the samples, the second's from the pruned first layer's outputs."""
    mod, samples = two_layers()
    spec = parse_prune(method)
    after = weights_of(Prune(spec, samples)(mod))
    first, second = find_layers(mod)
    weights = {name: array.astype(np.float64) for name, array in weights_of(mod).items()}
    moments = input_moments(mod, samples)
    x = samples["x"].astype(np.float64)
    np.testing.assert_allclose(moments["a"].gram[0], x.T @ x / len(x), rtol=1e-4)
    rows = prune_rows(first.to_rows(weights_of(mod)["a.weight"]), spec, spec.amount, moments["a"])
    np.testing.assert_allclose(after["a.weight"], first.from_rows(rows), atol=1e-5)
    hidden = np.maximum(x @ after["a.weight"] + weights["a.bias"], 0)
    seen = type(moments["b"])((hidden.T @ hidden / len(hidden))[None], hidden.mean(0)[None], len(hidden))
    rows = prune_rows(second.to_rows(weights_of(mod)["b.weight"]), spec, spec.amount, seen)
    np.testing.assert_allclose(after["b.weight"], second.from_rows(rows), rtol=1e-2, atol=1e-3)


def test_the_network_s_output_suffers_least_where_others_make_up():
    mod, samples = two_layers()
    exact = outputs(mod, samples)
    magnitude, wanda, sparsegpt = (
        float(np.square(outputs(Prune(spec, samples)(mod), samples) - exact).sum())
        for spec in ("magnitude:1x4:0.5", "wanda:1x4:0.5", "sparsegpt:1x4:0.5:refits=20")
    )
    assert sparsegpt < 0.8 * min(magnitude, wanda)


@pytest.mark.parametrize("spec", ["wanda:1x4:0.5", "sparsegpt:1x4:0.5", "sparsegpt:4x4:0.5", "sparsegpt:2:4:refits=5"])
def test_convolutions_lose_as_much_as_asked_and_less_than_by_magnitude(spec):
    mod = RecordLayers()(residual_network())
    pruned = Prune(spec, IMAGES)(mod)
    by_size = Prune(str(spec).replace("wanda", "magnitude").replace("sparsegpt", "magnitude").partition(":refits")[0])(
        mod
    )
    moments = input_moments(mod, IMAGES)
    records = layers_of(pruned)
    worse = 0
    for layer in find_layers(mod):
        before, after, plain = (layer.to_rows(weights_of(m)[layer.weight.name]) for m in (mod, pruned, by_size))
        # Shares are of units: ten outputs make short blocks of 4x4 at the end, and wanda rounds in every row.
        assert abs(records[layer.name].sparsity - 0.5) < 0.06
        assert records[layer.name].pruned_by == spec
        worse += output_error(before, after, moments[layer.name]) >= output_error(before, plain, moments[layer.name])
    # Later layers are pruned on other inputs than these, and of even inputs wanda knows no more than magnitude.
    assert worse <= 1 or spec.startswith("wanda")


def test_magnitude_by_sensitivity_needs_samples_and_spreads_what_goes():
    mod = residual_network()
    with pytest.raises(UsageError, match=r"magnitude:1x4:0.5:sensitivity looks at the inputs of each layer"):
        Prune("magnitude:1x4:0.5:sensitivity")(mod)
    pruned = Prune("magnitude:1x4:0.5:sensitivity", IMAGES)(mod)
    blocks = [array for name, array in weights_of(pruned).items() if name.endswith("weight")]
    zero = sum(np.count_nonzero(array == 0) for array in blocks) / sum(array.size for array in blocks)
    assert zero == pytest.approx(0.5, abs=0.02)
    shares = [np.mean(array == 0) for array in blocks]
    assert max(shares) - min(shares) > 0.1


def test_wanda_without_samples_is_refused():
    with pytest.raises(UsageError, match=r"network.onnx: wanda:2:4 looks at the inputs .* or prune by magnitude"):
        Prune("wanda:2:4")(residual_network())


def test_filters_are_not_for_this_pass():
    with pytest.raises(UsageError, match=r"filters:0.3 changes the network's shape"):
        Prune("filters:0.3")


def test_what_was_zero_stays_zero_with_updates():
    mod = Prune("magnitude:unstructured:0.3")(residual_network())
    after = Prune("sparsegpt:unstructured:0.6", IMAGES)(mod)
    for name, array in weights_of(mod).items():
        if name.endswith("weight"):
            assert (weights_of(after)[name][array == 0] == 0).all()
            assert np.mean(weights_of(after)[name] == 0) == pytest.approx(0.6, abs=0.02)


def test_progress_hears_of_every_sample_of_every_stage():
    heard = []
    Prune("wanda:2:4", IMAGES, lambda done, total: heard.append((done, total)))(residual_network())
    assert heard[:6] == [(i, 6) for i in range(1, 7)]
    assert len(heard) % 6 == 0
