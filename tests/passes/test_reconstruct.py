"""Least squares is the brute force: one layer's best weights are known, and blocks get nearer to them."""

import numpy as np
import pytest
import tvm
from network import Network, residual_network
from token_encoder import TOKENS, padded_texts, token_encoder
from tvm.relax import op as R

from pumice.errors import ModelError, UsageError
from pumice.module import layers_of, weights_of, with_weights
from pumice.passes import Prune
from pumice.passes.calibrate import Samples
from pumice.passes.evaluate import Evaluator
from pumice.passes.layers import find_layers
from pumice.passes.quantization_plan import quantize_rows, symmetric_scale
from pumice.passes.reconstruct import Reconstruct, ReconstructSpec

torch = pytest.importorskip("torch")

from pumice.passes.block_reconstruction import _Network, _pairs  # noqa: E402
from pumice.passes.sample_batches import SampleBatches  # noqa: E402

RNG = np.random.default_rng(0)


def two_layers():
    net = Network()
    hidden = net.relu("relu", net.linear("first", net.input("x", (1, 8)), 12))
    return net.finish(y=net.linear("second", hidden, 4))


def correlated(count, width=8):
    mixing = np.random.default_rng(5).normal(0, 1, (width, width))
    return (np.random.default_rng(6).normal(0, 1, (count, width)) @ mixing).astype(np.float32)


def outputs(mod, arrays):
    evaluator = Evaluator(mod)
    return np.stack([next(iter(evaluator.run(sample).values())) for sample in Samples(mod, arrays)])


def noise(dense, mod, arrays):
    target = outputs(dense, arrays)
    return float(((outputs(mod, arrays) - target) ** 2).mean() / (target**2).mean())


def test_one_layer_comes_to_its_least_squares_solution():
    """With its mask, row by row: what numpy's solver gives for the columns that are left."""
    net = Network()
    dense = net.finish(y=net.linear("only", net.input("x", (1, 8)), 6))
    pruned = Prune("magnitude:unstructured:0.5")(dense)
    x = correlated(400)
    after = Reconstruct(dense, {"x": x}, ReconstructSpec(steps=1500, batch=100))(pruned)
    target = x @ weights_of(dense)["only.weight"] + weights_of(dense)["only.bias"]
    best = np.empty_like(target)
    for channel, kept in enumerate((weights_of(pruned)["only.weight"] != 0).T):
        design = np.concatenate([x[:, kept], np.ones((len(x), 1), np.float32)], axis=1)
        best[:, channel] = design @ np.linalg.lstsq(design, target[:, channel], rcond=None)[0]
    reached = x @ weights_of(after)["only.weight"] + weights_of(after)["only.bias"]
    started = x @ weights_of(pruned)["only.weight"] + weights_of(pruned)["only.bias"]
    errors = [float(((each - target) ** 2).mean()) for each in (started, reached, best)]
    assert errors[2] <= errors[1] < errors[2] + 0.05 * (errors[0] - errors[2])


def test_memory_limits_how_many_samples_are_used():
    """Of each 8 floats go in and 4 come out, in either network; 15 % of the samples are held out."""
    dense, samples = two_layers(), {"x": correlated(200)}
    pruned = Prune("magnitude:1x4:0.5")(dense)
    for memory, held_out in ((2 * 12 * 4 * 40, 6), (2**30, 30), (1, 1)):
        after = Reconstruct(dense, samples, ReconstructSpec(steps=1, memory=memory))(pruned)
        assert f" on {held_out} held-out samples" in layers_of(after)["first"].notes[-1].replace("(", " ")


def test_two_layers_get_nearer_and_zeros_stay():
    dense, samples, unseen = two_layers(), {"x": correlated(200)}, {"x": correlated(300)[200:]}
    pruned = Prune("magnitude:1x4:0.5")(dense)
    spec = ReconstructSpec(steps=300, least_layers=1)
    after = Reconstruct(dense, samples, spec)(pruned)
    for layer in find_layers(dense):
        name = layer.weight.name
        zero = weights_of(pruned)[name] == 0
        assert zero.any() and (weights_of(after)[name][zero] == 0).all()
        assert layers_of(after)[layer.name].notes[-1].startswith("reconstructed: error of the block -")
    assert noise(dense, after, unseen) < 0.5 * noise(dense, pruned, unseen)
    again = Reconstruct(dense, samples, spec)(pruned)
    for name, value in weights_of(after).items():
        np.testing.assert_array_equal(weights_of(again)[name], value)


def test_what_is_exact_stays_as_it_is():
    dense, samples = two_layers(), {"x": correlated(40)}
    after = Reconstruct(dense, samples, ReconstructSpec(steps=20))(dense)
    for name, value in weights_of(dense).items():
        np.testing.assert_array_equal(weights_of(after)[name], value)
    assert (
        "did not lower the error of the block (-150.0 dB on 6 held-out samples)" in layers_of(after)["first"].notes[-1]
    )


def test_a_residual_network_and_its_whole():
    dense = residual_network()
    rng = np.random.default_rng(1)
    samples, unseen = ({"image": rng.normal(0, 1, (count, 4, 12, 12)).astype(np.float32)} for count in (60, 20))
    pruned = Prune("magnitude:1x4:0.6")(dense)
    seen = []
    blocks = Reconstruct(dense, samples, ReconstructSpec(steps=30), progress=lambda *step: seen.append(step))(pruned)
    assert seen == [(i, 30 * 2) for i in range(1, 61)]
    whole = Reconstruct(dense, samples, ReconstructSpec(steps=30, whole=True))(pruned)
    errors = [noise(dense, each, unseen) for each in (pruned, blocks, whole)]
    assert errors[1] < 0.5 * errors[0] and errors[2] <= errors[1] * 1.02
    assert "error of the whole network" in layers_of(whole)["stem"].notes[-1]


def test_int8_is_learned_to_be_lived_with():
    """Both are rounded afterwards; the one that was trained with rounding loses less."""
    dense, samples = two_layers(), {"x": correlated(200)}
    pruned = Prune("magnitude:1x4:0.25")(dense)

    def after(int8):
        mod = Reconstruct(dense, samples, ReconstructSpec(steps=400, least_layers=2, int8=int8))(pruned)
        return noise(dense, coarse(mod), samples)

    def coarse(mod):
        """Weights as ``Quantize`` stores them."""
        weights = dict(weights_of(mod))
        for layer in find_layers(mod):
            scale = symmetric_scale(layer, weights[layer.weight.name])
            weights[layer.weight.name] = quantize_rows(layer, weights[layer.weight.name], scale) * scale
        return with_weights(mod, weights)

    assert after(True) <= after(False) * 1.05 and after(True) < noise(dense, coarse(pruned), samples)


def test_the_rounding_that_is_trained_with_is_the_one_of_quantize():
    from pumice.passes.block_training import Parameter

    layer = find_layers(residual_network())[1]
    weight = RNG.normal(0, 1, (16, 16, 3, 3)).astype(np.float32)
    weight[3] = 0
    scale = symmetric_scale(layer, weight)
    expected = quantize_rows(layer, weight, scale) * scale.reshape(-1, 1, 1, 1)
    found = Parameter("w", torch.from_numpy(weight), None, layer.channel_axis).effective(torch.from_numpy(weight))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_encoder_is_trained_without_its_padding():
    dense, samples, unseen = token_encoder(), padded_texts(150), padded_texts(60, seed=9)
    pruned = Prune("magnitude:1x4:0.5")(dense)
    after = Reconstruct(dense, samples, ReconstructSpec(steps=40))(pruned)
    assert noise(dense, after, unseen) < 0.7 * noise(dense, pruned, unseen)
    assert all("reconstructed" in record.notes[-1] for record in layers_of(after).values())


def crops(mod, arrays):
    network = _Network(mod, list(Samples(mod, arrays)))
    return network.padding_is_unread(arrays["attention_mask"][:, None] != 0, _pairs(mod, mod, 2))


def test_padding_is_cut_off_only_where_nothing_reads_it():
    texts = padded_texts(20)
    assert crops(token_encoder(), texts)
    assert not crops(token_encoder(width=TOKENS), texts)  # channels look like tokens
    net = Network()
    ids, mask = net.input("ids", (1, TOKENS), "int64"), net.input("attention_mask", (1, TOKENS), "int64")
    table = net.weight("table", RNG.normal(0, 1, (20, 8)).astype(np.float32))
    x = net.linear("fc", net.call("embedded", R.take(table, ids, axis=0)), 8)
    x = net.call(
        "weighted", R.multiply(x, net.call("real", R.expand_dims(net.call("m", R.astype(mask, "float32")), 2)))
    )
    assert not crops(net.finish(y=net.call("mean", R.mean(x, [1]))), texts)  # the mean counts padding


def test_each_sample_counts_the_same_and_padding_nothing():
    real = np.array([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]], bool)
    batches = SampleBatches(3, real)
    value = torch.arange(3 * 1 * 4 * 2).reshape(3, 1, 4, 2).float()
    found = batches.mean_square(value, (1, 4, 2), torch.arange(3))
    squares = value.numpy() ** 2
    np.testing.assert_allclose(found, [squares[0, 0, :2].mean(), squares[1, 0, :1].mean(), 0])
    pooled = batches.mean_square(value[:, :, 0], (1, 2), torch.arange(3))
    np.testing.assert_allclose(pooled, squares[:, 0, 0].mean(-1))


def test_every_sample_is_in_one_minibatch():
    real = np.arange(8) < np.random.default_rng(0).integers(1, 9, (50, 1, 1))
    batches = SampleBatches(50, real, crops=True)
    for shuffle in (None, torch.Generator().manual_seed(1)):
        parts = batches.split(torch.arange(50), 7, shuffle)
        assert sorted(torch.cat(parts).tolist()) == list(range(50))
        for part in parts:
            assert batches.lengths(part) == {8: int(real[part.numpy()].sum(-1).max())}


def test_a_weight_that_two_blocks_read_is_left_alone_and_said_so():
    net = Network()
    weight = net.weight("shared.weight", RNG.normal(0, 0.5, (8, 8)).astype(np.float32))
    x = net.relu("r1", net.linear("shared", net.input("x", (1, 8)), 8, weight=weight))
    dense = net.finish(y=net.linear("own", net.relu("r2", net.linear("again", x, 8, weight=weight)), 4))
    pruned = Prune("magnitude:unstructured:0.5")(dense)
    after = Reconstruct(dense, {"x": correlated(60)}, ReconstructSpec(steps=30, least_layers=1))(pruned)
    np.testing.assert_array_equal(weights_of(after)["shared.weight"], weights_of(pruned)["shared.weight"])
    assert "another block reads its weight too" in layers_of(after)["shared"].notes[-1]
    assert "another block reads its weight too" in layers_of(after)["shared#2"].notes[-1]


def test_errors_name_what_does_not_fit():
    dense = two_layers()
    with pytest.raises(UsageError, match="needs samples to train on and others to choose by; there is 1"):
        Reconstruct(dense, {"x": correlated(1)})(dense)
    with pytest.raises(UsageError, match="give the very graph that was pruned"):
        Reconstruct(residual_network(), {"x": correlated(9)})(dense)
    with pytest.raises(ModelError, match="no array for input 'x'"):
        Reconstruct(dense, {"y": correlated(9)})(dense)
    with pytest.raises(UsageError, match="steps = 0"):
        ReconstructSpec(steps=0)


def test_without_layers_nothing_is_done():
    net = Network()
    mod = net.finish(y=net.relu("relu", net.input("x", (1, 8))))
    tvm.ir.assert_structural_equal(Reconstruct(mod, {})(mod), mod)
