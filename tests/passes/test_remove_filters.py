"""Filters that are removed: the smaller network against a forward pass by hand, and what ranks and refits it."""

from functools import partial

import numpy as np
import pytest
from coupled import NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from network import Network
from running import random_feed, run_compiled
from tvm import relax
from tvm.relax import op as R

from pumice.errors import UsageError
from pumice.module import layers_of, weights_of, with_weights
from pumice.passes import RecordLayers, SimplifyModel
from pumice.passes.channel_groups import find_channel_groups
from pumice.passes.channel_rules import label_channels
from pumice.passes.fold_batch_norm import norm_scales_of
from pumice.passes.prune_spec import Filters
from pumice.passes.refit_readers import refitted
from pumice.passes.remove_filters import RemoveFilters, choose
from pumice.passes.slice_channels import without_channels
from pumice.passes.statistics import Moments


def convolved(x, weight, bias):
    """A 3 x 3 convolution of ``x [C, H, W]``, padded by 1, by loops over the taps."""
    _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    taps = [
        np.einsum("oi,ihw->ohw", weight[:, :, dy, dx], padded[:, dy : dy + height, dx : dx + width])
        for dy in range(3)
        for dx in range(3)
    ]
    return np.sum(taps, axis=0) + bias.reshape(-1, 1, 1)


def two_layers(n=12):
    net = Network()
    x = net.input("image", (1, 3, 5, 5))
    x = net.relu("relu", net.conv("a", x, n, 3, padding=1))
    return net.finish(y=net.conv("b", x, 4, 3, padding=1))


def test_two_layers_are_the_network_written_out_without_the_channels():
    mod = two_layers()
    old = weights_of(mod)
    norms = np.abs(old["a.weight"]).sum((1, 2, 3))
    kept = np.sort(np.argsort(norms)[4:])
    after = RemoveFilters("filters:0.33:multiple=1")(mod)
    new = weights_of(after)
    np.testing.assert_array_equal(new["a.weight"], old["a.weight"][kept])
    np.testing.assert_array_equal(new["b.weight"], old["b.weight"][:, kept])
    inputs = random_feed(mod, seed=1)
    hidden = np.maximum(convolved(inputs["image"][0], old["a.weight"][kept], old["a.bias"][:, kept]), 0)
    expected = convolved(hidden, old["b.weight"][:, kept], old["b.bias"])
    np.testing.assert_allclose(run_compiled(after, inputs)[0][0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_network_without_channels_is_the_one_whose_readers_ignore_them(name, everywhere):
    """Brute force: zero what reads a channel, and all that is left of it is what removing it removes."""
    mod = NETWORKS[name]()
    groups = [g for g in find_channel_groups(mod) if g.not_removable is None and g.kind == "channels"]
    generator = np.random.default_rng(2)
    ranked = [(group, generator.random(group.channels)) for group in groups]
    removals = choose(ranked, Filters(0.4, everywhere=everywhere, multiple=2))
    assert removals
    ignoring = {name: array.copy() for name, array in weights_of(mod).items()}
    for removal in removals:
        for slot in removal.group.slots_of("consumer"):
            index = [slice(None)] * ignoring[slot.weight].ndim
            index[slot.axis] = slot.positions[removal.channels].ravel()
            ignoring[slot.weight][tuple(index)] = 0
    expected = run_compiled(with_weights(mod, ignoring), random_feed(mod, seed=1))
    after = without_channels(mod, label_channels(mod), removals)
    for a, b in zip(run_compiled(after, random_feed(mod, seed=1)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    for removal in removals:
        for slot in removal.group.slots:
            gone = len(removal.channels) * slot.positions.shape[1]
            assert weights_of(after)[slot.weight].shape[slot.axis] <= ignoring[slot.weight].shape[slot.axis] - gone


@pytest.mark.parametrize("name", ["residual", "mobile", "concats", "grouped"])
def test_removing_what_is_zero_changes_nothing(name):
    mod = NETWORKS[name]()
    weights = {name: array.copy() for name, array in weights_of(mod).items()}
    for group in find_channel_groups(mod):
        if group.not_removable is None:
            gone = np.arange(0, group.channels, 2)
            for slot in group.slots:
                if slot.role != "consumer":
                    index = [slice(None)] * weights[slot.weight].ndim
                    index[slot.axis] = slot.positions[gone].ravel()
                    weights[slot.weight][tuple(index)] = 0
    mod = with_weights(mod, weights)
    after = RemoveFilters("filters:0.5:multiple=1")(mod)
    macs = [sum(layer.macs for layer in layers_of(RecordLayers()(m)).values()) for m in (mod, after)]
    assert macs[1] < 0.6 * macs[0]
    inputs = random_feed(mod, seed=1)
    for a, b in zip(run_compiled(after, inputs), run_compiled(mod, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


def fake_group(channels, mod=None):
    """A group of two layers with so many channels."""
    return next(g for g in find_channel_groups(mod or two_layers(channels)) if g.not_removable is None)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0, 1), st.sampled_from([1, 4, 16]), st.integers(0, 99))
def test_what_is_left_is_the_largest_and_the_nearest_multiple(channels, amount, multiple, seed):
    score = np.random.default_rng(seed).random(channels)
    removals = choose([(_GROUPS[channels], score)], Filters(amount, multiple=multiple))
    gone = removals[0].channels if removals else np.arange(0)
    left = np.setdiff1d(np.arange(channels), gone)
    assert len(left) == channels or score[gone].max() < score[left].min()
    candidates = [n for n in range(multiple, channels + 1, multiple)] or [channels]
    distance = min(abs(n - channels * (1 - amount)) for n in [*candidates, channels])
    assert abs(len(left) - channels * (1 - amount)) == pytest.approx(distance)


_GROUPS = {channels: fake_group(channels) for channels in range(2, 41)}
_GROUPS[1] = type(_GROUPS[2])("channels", 1, (), (), (), None, None)


def test_all_together_the_smallest_relative_to_their_group_go():
    small, large = _GROUPS[8], _GROUPS[16]
    low, high = np.arange(1.0, 9.0), 100 * np.concatenate([np.full(8, 0.1), np.full(8, 1.9)])
    removals = choose([(small, low), (large, high)], Filters(0.5, everywhere=True, multiple=1))
    relative = np.concatenate([low / 4.5, high / 100])
    limit = np.sort(relative)[12]
    assert removals[0].channels.tolist() == np.flatnonzero(relative[:8] < limit).tolist()
    assert removals[1].channels.tolist() == list(range(8))


def test_a_grouped_convolution_keeps_multiples_in_all_its_groups_together():
    mod = NETWORKS["grouped"]()
    after = RemoveFilters("filters:0.3")(mod)
    assert weights_of(after)["stem.weight"].shape == (12, 4, 1, 1)
    assert weights_of(after)["g2.weight"].shape == (12, 6, 1, 1)
    # Each group reads 3 channels; behind the shuffle, where a group of 6 has channels of all four, nothing can go.
    assert weights_of(after)["g1.weight"].shape == (24, 3, 1, 1)
    assert weights_of(after)["dw.weight"].shape == (24, 1, 3, 3)


def test_a_coupled_channel_is_worth_the_sum_of_its_writers():
    net = Network()
    x = net.input("x", (1, 2, 1, 1))
    total = net.add("sum", net.conv("a", x, 4, bias=False), net.conv("b", x, 4, bias=False))
    mod = net.finish(y=net.conv("c", total, 2))
    a = np.array([[3, 4], [0, 1], [5, 0], [0, 0]], np.float32)
    b = np.array([[0, 0], [6, 0], [0, 1], [3, 3]], np.float32)
    weights = {**weights_of(mod), "a.weight": a.reshape(4, 2, 1, 1), "b.weight": b.reshape(4, 2, 1, 1)}
    mod = with_weights(mod, weights)
    for by, worth in (("l1", [7, 7, 6, 6]), ("l2", [5, 7, 6, 18**0.5])):
        kept = np.sort(np.argsort(-np.array(worth), kind="stable")[:2])
        after = RemoveFilters(Filters(0.5, by=by, multiple=1))(mod)
        np.testing.assert_array_equal(weights_of(after)["a.weight"][:, :, 0, 0], a[kept])


def test_by_activation_the_channel_with_the_smallest_values_goes():
    mod = two_layers(4)
    weights = dict(weights_of(mod))
    weights["a.bias"] = np.array([5, -50, 1, 9], np.float32).reshape(1, 4, 1, 1)  # the second is never active
    least_active = RemoveFilters(Filters(0.25, by="activation", multiple=1), random_feed(mod, 8, 1))
    after = least_active(with_weights(mod, weights))
    np.testing.assert_array_equal(weights_of(after)["a.weight"], weights["a.weight"][[0, 2, 3]])


def normalized(gamma):
    net = Network()
    x = net.input("image", (1, 3, 5, 5))
    vectors = [
        net.weight(f"bn.{name}", np.asarray(value, np.float32))
        for name, value in (("weight", gamma), ("bias", np.zeros(4)), ("mean", np.zeros(4)), ("var", np.ones(4)))
    ]
    x = net.conv("a", x, 4, 3, bias=False)
    x = net.call("bn", relax.TupleGetItem(net.call("bn.all", R.nn.batch_norm(x, *vectors, 1, training=False)), 0))
    return SimplifyModel()(net.finish(y=net.conv("b", net.relu("relu", x), 2)))


def test_by_norm_scale_the_smallest_gamma_goes_whatever_the_weights():
    mod = normalized([-2, 0.5, 1, 3])
    np.testing.assert_array_equal(norm_scales_of(mod)["a.weight"], np.float32([2, 0.5, 1, 3]))
    weights = dict(weights_of(mod))
    weights["a.weight"] = weights["a.weight"] * np.float32([1e-3, 100, 1, 1]).reshape(4, 1, 1, 1)
    after = RemoveFilters("filters:0.5:by=norm-scale:multiple=1")(with_weights(mod, weights))
    np.testing.assert_array_equal(weights_of(after)["a.weight"], weights["a.weight"][[0, 3]])
    np.testing.assert_array_equal(norm_scales_of(after)["a.weight"], np.float32([2, 3]))


def test_norm_scale_needs_one():
    with pytest.raises(UsageError, match="no batch norm was folded into a layer"):
        RemoveFilters("filters:0.5:by=norm-scale")(two_layers())


def test_refitting_is_ridge_regression():
    """Against the least squares of numpy, on the samples themselves, with the damping as extra rows."""
    generator = np.random.default_rng(4)
    samples = generator.standard_normal((50, 6)) @ generator.standard_normal((6, 6)) + generator.standard_normal(6)
    rows = generator.standard_normal((5, 2, 3))
    gone = np.array([False, True, False])
    moments = Moments((samples.T @ samples / 50)[None], samples.mean(0)[None], 50)
    new, shift = refitted(rows, gone, moments, update=True)
    lost = np.tile(gone, 2)
    centred = samples - samples.mean(0)
    damping = 0.01 * np.square(centred[:, ~lost]).mean()
    target = centred[:, lost] @ rows.reshape(5, 6)[:, lost].T
    stacked = np.concatenate([centred[:, ~lost], np.sqrt(50 * damping) * np.eye(4)])
    change = np.linalg.lstsq(stacked, np.concatenate([target, np.zeros((4, 5))]), rcond=None)[0]
    np.testing.assert_allclose(new.reshape(5, 6)[:, ~lost], rows.reshape(5, 6)[:, ~lost] + change.T, rtol=1e-6)
    before, after = samples @ rows.reshape(5, 6).T, samples[:, ~lost] @ new.reshape(5, 6)[:, ~lost].T + shift
    np.testing.assert_allclose(after.mean(0), before.mean(0), rtol=1e-9, atol=1e-9)
    kept, mean = refitted(rows, gone, moments, update=False)
    np.testing.assert_array_equal(kept, rows)
    np.testing.assert_allclose(mean, rows.reshape(5, 6)[:, lost] @ samples.mean(0)[lost])


def mean_error(before, after, samples):
    pieces = [{name: array[i : i + 1] for name, array in samples.items()} for i in range(16)]
    pairs = [(run(piece) for run in (partial(run_compiled, before), partial(run_compiled, after))) for piece in pieces]
    return np.mean([np.square(a[0] - b[0]).mean() for a, b in pairs])


@pytest.mark.parametrize("bias", [True, False])
def test_readers_make_up_for_what_is_gone(bias):
    net = Network()
    x = net.relu("relu", net.linear("a", net.input("x", (1, 6)), 16))
    mod = net.finish(y=net.linear("b", x, 8, bias=bias))
    samples = random_feed(mod, 200, 1)
    spec = "filters:0.25"
    errors = [
        mean_error(mod, RemoveFilters(spec, given, update)(mod), samples)
        for given, update in ((None, True), (samples, False), (samples, True))
    ]
    assert errors[0] > 1.2 * errors[1] > 1.5 * errors[2]
    refit = weights_of(RemoveFilters(spec, samples)(mod))
    assert refit["b.bias"].shape == (8,)


def test_zeros_in_a_pattern_stay_zero():
    mod = two_layers(16)
    weights = dict(weights_of(mod))
    mask = np.random.default_rng(3).random(weights["b.weight"].shape) < 0.5
    weights["b.weight"] = np.where(mask, 0, weights["b.weight"]).astype(np.float32)
    after = weights_of(RemoveFilters("filters:0.5", random_feed(mod, 20, 1))(with_weights(mod, weights)))
    kept = np.sort(np.argsort(np.abs(weights["a.weight"]).sum((1, 2, 3)))[8:])
    np.testing.assert_array_equal(after["b.weight"], weights["b.weight"][:, kept])
    assert np.abs(after["b.bias"] - weights["b.bias"]).max() > 0


def test_records_say_what_is_left_and_why_the_rest_is_whole():
    mod = RecordLayers()(NETWORKS["mobile"]())
    records = layers_of(RemoveFilters("filters:0.5:keep=b.dw")(mod))
    assert records["a.up"].pruned_by == "filters:0.5:keep=b.dw"
    assert records["a.up"].notes == ["8 of 16 output channels left", "4 of 8 input channels left"]
    assert records["a.dw"].notes == ["8 of 16 output channels left"]
    assert records["a.dw"].shape == (8, 1, 3, 3)
    assert records["a.dw"].macs == 8 * 9 * 64
    assert records["b.up"].notes == ["4 of 8 input channels left", "filters not removed: keep=b.dw, for b.dw"]
    assert records["fc"].pruned_by == ""
    assert records["fc"].notes == ["8 of 16 input channels left", "filters not removed: it is an output of the model"]


def test_only_the_named_layers_lose_filters():
    after = weights_of(RemoveFilters("filters:0.5:only=a.up")(NETWORKS["mobile"]()))
    assert after["a.up.weight"].shape == (8, 8, 1, 1)
    assert after["b.up.weight"].shape == (16, 8, 1, 1)


def test_what_a_layer_norm_sees_is_left_alone():
    mod = RecordLayers()(NETWORKS["transformer"]())
    after = RemoveFilters("filters:0.5")(mod)
    assert weights_of(after)["table.weight"].shape == (20, 16)
    assert weights_of(after)["up.weight"].shape == (16, 12)
    assert "nn.layer_norm 'norm0' takes statistics over it" in layers_of(after)["down"].notes[-1]
    assert "the same size" in layers_of(after)["att.v"].notes[-1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magnitude:1x4:0.5", "removes no filters"),
        ("filters:0.5:by=activation", "needs calibration data"),
        ("filters:0.5:keep=nothing*", "names no layer"),
    ],
)
def test_what_cannot_be_done_is_said(spec, message):
    with pytest.raises(UsageError, match=message):
        RemoveFilters(spec)(two_layers())
