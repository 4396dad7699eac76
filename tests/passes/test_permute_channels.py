import numpy as np
import pytest
from coupled import NETWORKS
from network import Network
from scripted import assert_same_numbers

from pumice.errors import UsageError
from pumice.module import layers_of, weights_of
from pumice.passes import Prune, RecordLayers
from pumice.passes.layers import find_layers
from pumice.passes.permute_channels import PermuteChannels
from pumice.passes.source_order import source_orders_of


def kept(mod, spec):
    """The share of magnitude that is left after pruning, over all layers that lose any."""
    pruned = weights_of(Prune(spec)(mod))
    before = {layer.weight.name: np.abs(weights_of(mod)[layer.weight.name]).sum() for layer in find_layers(mod)}
    changed = [name for name in before if not np.array_equal(pruned[name], weights_of(mod)[name])]
    return sum(np.abs(pruned[name]).sum() for name in changed) / sum(before[name] for name in changed)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("spec", ["magnitude:1x4:0.5", "magnitude:2:4", "magnitude:4x4:0.5"])
def test_the_outputs_stay_and_pruning_keeps_more(name, spec):
    mod = RecordLayers()(NETWORKS[name]())
    after = PermuteChannels(spec, rounds=40)(mod)
    assert_same_numbers(mod, after, rtol=1e-4)
    assert kept(after, spec) >= kept(mod, spec) - 1e-6
    for weight, array in weights_of(mod).items():  # values only change places
        np.testing.assert_array_equal(np.sort(weights_of(after)[weight], axis=None), np.sort(array, axis=None))


def pairs_apart():
    """Hidden channels 0, 2, 4, ... matter and the others do not: in order, every block of four is half empty."""
    net = Network(1)
    x = net.input("x", (1, 6))
    mod = net.finish(y=net.linear("b", net.relu("r", net.linear("a", x, 16)), 8))
    weights = dict(weights_of(mod))
    weights["b.weight"] = np.where(np.arange(16)[:, None] % 2 == 0, 1, 1e-3).astype(np.float32) * weights["b.weight"]
    from pumice.module import with_weights

    return RecordLayers()(with_weights(mod, weights))


def test_what_does_not_matter_comes_together():
    mod = pairs_apart()
    after = PermuteChannels("magnitude:1x4:0.5:only=b")(mod)
    blocks = np.abs(weights_of(after)["b.weight"]).sum(1).reshape(4, 4)
    small = blocks < 0.01 * blocks.max()
    assert sorted(small.sum(1).tolist()) == [0, 0, 4, 4]  # each block is of one kind
    assert kept(mod, "magnitude:1x4:0.5:only=b") < 0.75
    assert kept(after, "magnitude:1x4:0.5:only=b") > 0.99
    note = layers_of(after)["b"].notes[0]
    assert note.startswith("input channels reordered: its 1x4 blocks keep 9")
    assert note.endswith("in the order of the source")


def test_where_each_channel_was_is_known():
    mod = pairs_apart()
    after = PermuteChannels("magnitude:1x4:0.5:only=b")(mod)
    assert {"a.weight", "b.weight"} <= set(source_orders_of(after))
    assert not source_orders_of(mod)


def test_zeros_that_are_there_are_gathered_in_blocks():
    mod = Prune("magnitude:unstructured:0.5:only=b")(pairs_apart())
    after = PermuteChannels(pattern="1x4")(mod)
    filled = [int((weights_of(m)["b.weight"].T.reshape(8, 4, 4) != 0).any(-1).sum()) for m in (mod, after)]
    assert filled == [32, 16]
    assert_same_numbers(mod, after)
    again = PermuteChannels(pattern="1x4")(after)
    assert int((weights_of(again)["b.weight"].T.reshape(8, 4, 4) != 0).any(-1).sum()) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), None), "channels are permuted for prune specifications, or for a pattern"),
        (("magnitude:1x4:0.5", "1x4"), "channels are permuted for prune specifications, or for a pattern"),
        (("filters:0.5", None), "takes whole channels out, so their order is nothing to it"),
        (((), "2:4"), "zeros are gathered in blocks, such as 1x4; 2:4 has none"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(arguments, message):
    specs, pattern = arguments
    with pytest.raises(UsageError, match=message):
        PermuteChannels(specs, pattern=pattern)


def test_wanda_needs_samples():
    with pytest.raises(UsageError, match="so permuting channels for it needs calibration data"):
        PermuteChannels("wanda:1x4:0.5")(pairs_apart())
    samples = {"x": np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)}
    after = PermuteChannels("wanda:1x4:0.5", samples)(pairs_apart())
    assert_same_numbers(pairs_apart(), after)
