import numpy as np
import pytest
from network import Network
from tvm.relax import op as R

from pumice.errors import ModelError
from pumice.module import layers_of, weights_of, with_weights
from pumice.passes.dataflow import Dataflow
from pumice.passes.equalize import EqualizeChannels, find_streams
from pumice.passes.evaluate import Evaluator
from pumice.passes.rewriting import shape_of
from pumice.passes.sparsity import RecordLayers

# Scaling rounds each weight twice; the sums of at most a few hundred products differ by a few float32 roundings.
_ROUNDING = dict(rtol=2e-5, atol=2e-5)


def two_layers(activation=R.nn.relu):
    """A convolution, read by a depthwise one: its channels go all the way to one range."""
    net = Network()
    y = net.conv("a", net.input("image", (1, 4, 6, 6)), 8, 3, padding=1)
    y = net.call("y", activation(y))
    return net.finish(z=net.conv("b", y, 8, 3, padding=1, groups=8))


def uneven(mod, name, axis=0):
    """The module with output channels of very different size, one in a hundred to one."""
    weights = dict(weights_of(mod))
    for part in ("weight", "bias"):
        array = weights[f"{name}.{part}"]
        shape = [1] * array.ndim
        where = axis if part == "weight" else int(np.argmax(array.shape))
        shape[where] = -1
        weights[f"{name}.{part}"] = array * np.geomspace(0.05, 1, array.shape[where], dtype=np.float32).reshape(shape)
    return with_weights(mod, weights)


def samples(mod, count=3, seed=1):
    rng = np.random.default_rng(seed)
    return {var.name: rng.normal(0, 1, (count, *shape_of(var)[1:])).astype(np.float32) for var in Dataflow(mod).inputs}


def maxima(mod, given, *names):
    """The largest magnitude per channel (axis 1, or the last of matrices) of the tensors of these names."""
    variables = {var.name: var for var in Dataflow(mod).order}
    evaluator = Evaluator(mod, [variables[name] for name in names])
    largest = [0] * len(names)
    for i in range(len(given["image"])):
        values = evaluator.observe({"image": given["image"][i : i + 1]})
        for j, value in enumerate(values):
            axes = (0, 2, 3) if value.ndim == 4 else tuple(range(value.ndim - 1))
            largest[j] = np.maximum(largest[j], np.abs(value).max(axes))
    return largest


def assert_same_function(before, after, given):
    first, second = Evaluator(before), Evaluator(after)
    for i in range(len(given["image"])):
        sample = {"image": given["image"][i : i + 1]}
        for a, b in zip(first.run(sample).values(), second.run(sample).values(), strict=True):
            np.testing.assert_allclose(b, a, **_ROUNDING)


def test_two_layers_reach_one_range_and_compute_the_same():
    mod = uneven(two_layers(), "a")
    given = samples(mod)
    after = EqualizeChannels(given)(mod)
    (before_range,), (after_range,) = maxima(mod, given, "y"), maxima(after, given, "y")
    assert before_range.max() > 5 * before_range.min()
    np.testing.assert_allclose(after_range, before_range.max(), rtol=1e-5)
    # An unseen sample is computed the same as well: behind a plain ReLU nothing is clipped.
    assert_same_function(mod, after, samples(mod, seed=2))


def test_the_factors_are_in_the_weights():
    mod = uneven(two_layers(), "a")
    given = samples(mod)
    before, after = weights_of(mod), weights_of(EqualizeChannels(given)(mod))
    (largest,) = maxima(mod, given, "y")
    factors = largest.max() / largest
    np.testing.assert_allclose(after["a.weight"], before["a.weight"] * factors[:, None, None, None], rtol=1e-5)
    np.testing.assert_allclose(after["a.bias"], before["a.bias"] * factors[:, None, None], rtol=1e-5)
    np.testing.assert_allclose(after["b.weight"], before["b.weight"] / factors[:, None, None, None], rtol=1e-5)
    np.testing.assert_array_equal(after["b.bias"], before["b.bias"])


def test_relu6_is_clipped_at_the_largest_value_seen():
    mod = uneven(two_layers(lambda x: R.clip(x, 0, 6)), "a")
    weights = dict(weights_of(mod))
    mod = with_weights(mod, {**weights, "a.bias": np.full_like(weights["a.bias"], 0.3)})
    given = samples(mod)
    after = EqualizeChannels(given)(mod)
    assert_same_function(mod, after, given)
    (largest,) = maxima(after, given, "y")
    assert largest.max() <= 6
    np.testing.assert_allclose(largest, largest.max(), rtol=1e-5)


def inverted_residual():
    """expand -> ReLU6 -> depthwise -> ReLU6 -> project, added to what came in, and a layer that reads the sum."""
    net = Network()
    x = net.conv("first", net.input("image", (1, 4, 8, 8)), 8)
    y = net.call("expanded", R.clip(net.conv("expand", x, 16), 0, 6))
    y = net.call("filtered", R.clip(net.conv("depthwise", y, 16, 3, padding=1, groups=16), 0, 6))
    x = net.add("sum", x, net.conv("project", y, 8))
    return net.finish(y=net.conv("last", x, 4))


def test_inverted_residual():
    mod = inverted_residual()
    for name in ("first", "expand", "depthwise", "project"):
        mod = uneven(mod, name)
    given = samples(mod)
    after = EqualizeChannels(given)(mod)
    assert_same_function(mod, after, given)
    names = ("expanded", "filtered", "first.biased", "sum")
    (expanded, filtered, *stream), after_ranges = maxima(mod, given, *names), maxima(after, given, *names)
    # Where the reader is depthwise, all the way, as far as the bound of 64 lets it.
    np.testing.assert_allclose(after_ranges[0], np.minimum(expanded.max(), 64 * expanded), rtol=1e-5)
    # Where it is dense, by the square root.
    np.testing.assert_allclose(after_ranges[1], np.sqrt(filtered * filtered.max()), rtol=1e-5)
    # The stream's two tensors share their factors: by the geometric mean of their ranges.
    ratio = np.sqrt(np.prod(after_ranges[2:], 0)) / np.sqrt(np.sqrt(np.prod(stream, 0)))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_a_stream_joins_what_an_add_joins():
    mod = inverted_residual()
    graph = Dataflow(mod)
    streams = {tuple(layer.name for layer in stream.producers): stream for stream in find_streams(mod, graph)}
    assert set(streams) == {("first", "project"), ("expand",), ("depthwise",)}
    assert [layer.name for layer in streams["first", "project"].consumers] == ["expand", "last"]


def test_zero_weights_stay_zero_and_dead_channels_stay():
    mod = uneven(two_layers(), "a")
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    weights["a.weight"][:, :2] = 0
    weights["b.weight"][1:3] = 0
    weights["a.weight"][3], weights["a.bias"][:, 3] = 0, -1  # a channel that never fires
    mod = with_weights(mod, weights)
    after = weights_of(EqualizeChannels(samples(mod))(mod))
    for name, array in weights.items():
        np.testing.assert_array_equal(after[name] == 0, array == 0)
    np.testing.assert_array_equal(after["a.bias"][:, 3], weights["a.bias"][:, 3])
    np.testing.assert_array_equal(after["b.weight"][3], weights["b.weight"][3])


def test_factors_are_bounded():
    mod = two_layers()
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    weights["a.weight"][5] *= 1e-6
    weights["a.bias"][:, 5] = 1e-6
    after = weights_of(EqualizeChannels(samples(mod))(with_weights(mod, weights)))
    np.testing.assert_allclose(after["a.weight"][5], 64 * weights["a.weight"][5], rtol=1e-6)


def test_grouped_convolution_reads_its_own_group():
    net = Network()
    y = net.relu("y", net.conv("a", net.input("image", (1, 4, 6, 6)), 8))
    mod = uneven(net.finish(z=net.conv("b", y, 4, 3, padding=1, groups=2)), "a")
    given = samples(mod)
    assert_same_function(mod, EqualizeChannels(given)(mod), given)


def test_linear_layers():
    net = Network()
    y = net.relu("y", net.linear("a", net.input("image", (1, 3, 8)), 12))
    mod = uneven(net.finish(z=net.linear("b", y, 4)), "a", axis=1)
    given = samples(mod)
    after = EqualizeChannels(given)(mod)
    assert_same_function(mod, after, given)
    (before_range,), (after_range,) = maxima(mod, given, "y"), maxima(after, given, "y")
    np.testing.assert_allclose(after_range, np.sqrt(before_range * before_range.max()), rtol=1e-5)


@pytest.mark.parametrize(
    "reader",
    [
        lambda net, y: net.call("other", R.sigmoid(y)),
        lambda net, y: net.call("other", R.reshape(y, (1, 288))),
        lambda net, y: net.call("other", R.multiply(y, y)),
        lambda net, y: y,  # the model's own output
    ],
)
def test_what_another_reader_sees_stays(reader):
    net = Network()
    y = net.relu("y", net.conv("a", net.input("image", (1, 4, 6, 6)), 8, 3, padding=1))
    mod = uneven(net.finish(z=net.conv("b", y, 4), w=reader(net, y)), "a")
    after = EqualizeChannels(samples(mod))(mod)
    for name, array in weights_of(mod).items():
        np.testing.assert_array_equal(weights_of(after)[name], array)


def test_clip_that_is_no_relu_stays():
    mod = uneven(two_layers(lambda x: R.clip(x, -1, 1)), "a")
    after = EqualizeChannels(samples(mod))(mod)
    np.testing.assert_array_equal(weights_of(after)["a.weight"], weights_of(mod)["a.weight"])


def test_shared_weights_stay():
    net = Network()
    w = net.weight("shared.weight", np.geomspace(0.05, 1, 16, dtype=np.float32).reshape(4, 4, 1, 1))
    y = net.relu("y", net.conv("a", net.input("image", (1, 4, 6, 6)), 4, bias=False, weight=w))
    mod = net.finish(z=net.conv("b", y, 4, bias=False, weight=w))
    after = EqualizeChannels(samples(mod))(mod)
    np.testing.assert_array_equal(weights_of(after)["shared.weight"], weights_of(mod)["shared.weight"])


def test_the_record_says_so():
    mod = uneven(two_layers(), "a")
    records = layers_of(EqualizeChannels(samples(mod))(RecordLayers()(mod)))
    assert "output channels equalized: scaled by up to" in records["a"].notes[-1]
    assert not any("equalized" in note for note in records["b"].notes)


def test_samples_must_fit():
    with pytest.raises(ModelError, match="no array for input 'image'"):
        EqualizeChannels({})(two_layers())
