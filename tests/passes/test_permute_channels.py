import numpy as np
import pytest
import tvm
from coupled import NETWORKS, transformer
from network import Network
from scripted import assert_same_numbers, bindings
from tvm.ir import IRModule

from pumice.errors import ModelError, UsageError
from pumice.module import layers_of, weights_of, with_weights
from pumice.passes import Prune, RecordLayers
from pumice.passes.layers import find_layers
from pumice.passes.permute_channels import PermuteChannels, fixed_layers
from pumice.passes.source_order import source_orders_of, with_source_orders


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
    assert not source_orders_of(mod)
    after = PermuteChannels("magnitude:4x1:0.5:only=a")(PermuteChannels("magnitude:1x4:0.5:only=b")(mod))
    order = source_orders_of(after)
    np.testing.assert_array_equal(order["a.weight"][0], order["b.weight"][2])
    np.testing.assert_array_equal(weights_of(after)["b.weight"], weights_of(mod)["b.weight"][order["b.weight"][2]])
    np.testing.assert_array_equal(weights_of(after)["a.weight"], weights_of(mod)["a.weight"][:, order["a.weight"][0]])


def moves(name, indices, said):
    """A pass that moves the rows of a weight, and says something of it."""

    @tvm.transform.module_pass(opt_level=0, name="Move")
    class Move:
        def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
            weights = weights_of(mod)
            return with_source_orders(with_weights(mod, {**weights, name: weights[name][indices]}), said)

    return Move()


def test_zeros_may_move_only_as_the_pass_says():
    """The fixture of this folder's tests checks every pass for pruned weights that came back."""
    weight = np.ones((16, 8), np.float32)
    weight[3] = 0
    mod = with_weights(pairs_apart(), {**weights_of(pairs_apart()), "b.weight": weight})
    turned = np.roll(np.arange(16), 1)
    moved = moves("b.weight", turned, {"b.weight": {2: turned}})(mod)
    moves("b.weight", turned, {"b.weight": {2: turned[turned]}})(moved)
    wrong = ((turned, {}), (turned, {"b.weight": {2: turned[::-1]}}), (np.arange(16), {"b.weight": {2: turned}}))
    for indices, said in wrong:
        with pytest.raises(ModelError, match=r"the pass Move made 8 of 8 zero weights of b.weight nonzero"):
            moves("b.weight", indices, said)(with_weights(mod, {**weights_of(mod), "b.weight": weight.copy()}))


def test_channels_of_a_head_stay_in_their_head():
    mod = RecordLayers()(transformer())
    order = source_orders_of(PermuteChannels("magnitude:1:2:only=att.out")(mod))
    assert (order["att.out.weight"][2] != np.arange(16)).any()
    np.testing.assert_array_equal(order["att.out.weight"][2] // 4, np.arange(16) // 4)
    np.testing.assert_array_equal(order["att.out.weight"][2], order["att.v.weight"][0])


def test_a_stream_that_is_an_output_is_put_in_order_again_or_left_alone():
    mod = RecordLayers()(transformer())
    assert bindings(PermuteChannels("magnitude:1x4:0.5")(mod)).count("take") == bindings(mod).count("take") + 1
    inside = PermuteChannels("magnitude:1x4:0.5", outputs=False)(mod)
    assert bindings(inside) == bindings(mod)
    assert layers_of(inside)["down"].notes
    assert not layers_of(inside)["up"].notes


def test_layers_that_cannot_be_ordered_say_why():
    reasons = fixed_layers(RecordLayers()(pairs_apart()))
    assert list(reasons) == ["a"]
    assert "the model's input 'x'" in reasons["a"]


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
