import numpy as np
import pytest
from network import Network
from tvm.relax import op as R

from pumice.errors import ModelError
from pumice.module import weights_of
from pumice.passes.layers import find_layers
from pumice.passes.padding import real_positions, token_mask
from pumice.passes.statistics import Moments, input_moments, output_error


def windows(image, kernel, stride, padding, dilation=1):
    """What each output position of a convolution reads, ``[positions, taps, C]``, by loops."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding))
    padded[:, padding : padding + height, padding : padding + width] = image
    span = (kernel - 1) * dilation
    found = []
    for y in range(0, padded.shape[1] - span, stride):
        for x in range(0, padded.shape[2] - span, stride):
            taps = [padded[:, y + i * dilation, x + j * dilation] for i in range(kernel) for j in range(kernel)]
            found.append(np.array(taps))
    return np.array(found)


def moments_of(rows):
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("stride, padding, groups", [(1, 1, 1), (2, 0, 1), (1, 1, 2), (2, 1, 4)])
def test_moments_of_a_convolution_are_those_of_its_windows(stride, padding, groups):
    net = Network()
    x = net.input("image", (1, 4, 7, 6))
    mod = net.finish(y=net.conv("conv", x, 8, 3, stride, padding, groups))
    images = np.random.default_rng(0).standard_normal((3, 4, 7, 6)).astype(np.float32)
    found = input_moments(mod, {"image": images})["conv"]
    seen = np.concatenate([windows(image, 3, stride, padding) for image in images])
    assert found.count == len(seen)
    for group, channels in enumerate(np.split(np.arange(4), groups)):
        columns = seen[:, :, channels].reshape(len(seen), -1)
        np.testing.assert_allclose(found.gram[group], moments_of(columns), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.mean[group], columns.mean(0), rtol=1e-4, atol=1e-5)


def test_the_error_of_other_weights_is_that_of_the_output():
    net = Network()
    x = net.input("image", (1, 4, 5, 5))
    mod = net.finish(y=net.conv("conv", x, 8, 3, 1, 1, groups=2, bias=False))
    images = np.random.default_rng(1).standard_normal((2, 4, 5, 5)).astype(np.float32)
    found = input_moments(mod, {"image": images})["conv"]
    (layer,) = find_layers(mod)
    before = layer.to_rows(weights_of(mod)["conv.weight"])
    after = np.where(np.random.default_rng(2).random(before.shape) < 0.5, 0, before)
    signal = noise = 0.0
    for image in images:
        for window in windows(image, 3, 1, 1):
            for row in range(8):
                inputs = window[:, 2 * (row // 4) : 2 * (row // 4) + 2]
                signal += (before[row] * inputs).sum() ** 2
                noise += ((before[row] - after[row]) * inputs).sum() ** 2
    assert output_error(before, after, found) == pytest.approx(noise / signal, rel=1e-4)
    assert output_error(before, before, found) == 0
    assert output_error(0 * before, after, found) == 0  # nothing to compare with


def transformer_inputs():
    net = Network()
    x = net.input("x", (2, 5, 4))
    mask = net.input("attention_mask", (2, 5), "int64")
    real = net.call("each", R.expand_dims(net.call("real", R.astype(mask, "float32")), -1))
    scaled = net.call("scaled", R.multiply(x, real))
    return net.finish(y=net.linear("fc", net.add("sum", x, scaled), 3))


def test_padding_tokens_do_not_count():
    mod = transformer_inputs()
    assert token_mask(mod) == "attention_mask"
    draw = np.random.default_rng(3)
    x = draw.standard_normal((4, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1] * 5, [0, 0, 0, 0, 1]])
    found = input_moments(mod, {"x": x, "attention_mask": mask})["fc"]
    real = 2 * x[mask.astype(bool)].astype(np.float64)
    assert found.count == mask.sum()
    np.testing.assert_allclose(found.gram[0], moments_of(real), rtol=1e-5)


def test_a_sample_of_nothing_but_padding_counts_whole():
    value = np.ones((1, 3, 2))
    assert len(real_positions(value, np.zeros((1, 3), bool))) == 3
    assert len(real_positions(value, np.array([[True, False, False]]))) == 1
    assert len(real_positions(value, None)) == 3
    assert len(real_positions(np.ones((4, 2)), np.zeros((1, 3), bool))) == 4


def test_no_mask_where_no_input_is_called_one():
    net = Network()
    ids = net.input("ids", (1, 5), "int64")
    x = net.input("mask", (1, 5, 4))
    assert token_mask(net.finish(y=net.linear("fc", x, 3), ids=ids)) is None


def test_layers_that_read_the_same_share_their_moments():
    net = Network()
    x = net.input("x", (1, 5, 4))
    mod = net.finish(a=net.linear("q", x, 3), b=net.linear("k", x, 6))
    found = input_moments(mod, {"x": np.ones((1, 5, 4), np.float32)})
    assert found["q"] is found["k"]


def test_at_most_so_many_samples_evenly_spread():
    net = Network()
    mod = net.finish(y=net.linear("fc", net.input("x", (1, 2)), 3))
    x = np.arange(20, dtype=np.float32).reshape(10, 2)
    done = []
    found = input_moments(mod, {"x": x}, limit=4, progress=lambda number, total: done.append((number, total)))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    np.testing.assert_allclose(found["fc"].gram[0], moments_of(x[::3].astype(np.float64)))


def test_each_output_channel_reads_its_group():
    moments = Moments(np.zeros((2, 3, 3)), np.zeros((2, 3)), 1)
    np.testing.assert_array_equal(moments.of_rows(6), [0, 0, 0, 1, 1, 1])


def test_samples_that_do_not_fit_are_refused():
    net = Network()
    mod = net.finish(y=net.linear("fc", net.input("x", (1, 2)), 3))
    with pytest.raises(ModelError, match="no array for input 'x'"):
        input_moments(mod, {"y": np.zeros((1, 2), np.float32)})
