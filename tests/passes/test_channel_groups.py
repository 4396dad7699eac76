"""Channel groups: brute force on networks that couple channels in every way, and the reasons why some are fixed."""

import numpy as np
import pytest
from coupled import NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st
from network import Network
from running import random_feed, run_compiled
from tvm.relax import op as R

from pumice.module import weights_of
from pumice.passes import Calibrate, Quantize
from pumice.passes.channel_groups import find_channel_groups, permuted, permuted_weights
from pumice.passes.layers import find_layers


def places(group, role=None):
    """``{(weight, axis): positions}`` of a group as plain lists."""
    slots = group.slots if role is None else group.slots_of(role)
    return {(slot.weight, slot.axis): slot.positions.tolist() for slot in slots}


def group_of(mod, weight, axis, kind="channels"):
    (found,) = [g for g in find_channel_groups(mod) if (weight, axis) in places(g) and g.kind == kind]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_any_order_of_any_free_group_gives_the_same_outputs(name):
    before = NETWORKS[name]()
    generator = np.random.default_rng(5)
    after, changed = before, set()
    groups = [group for group in find_channel_groups(before) if group.fixed is None]
    for group in sorted(groups, key=lambda group: len(group.outputs)):
        after = permuted(after, group, generator.permutation(group.channels))
        changed |= {(slot.weight, slot.axis) for slot in group.slots}
    inputs = random_feed(before, seed=1, below=20)
    for a, b in zip(run_compiled(before, inputs), run_compiled(after, inputs), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max())
    # ... and it was not for want of groups: every output axis of a layer is in a free one.
    layers = find_layers(before)
    assert {(layer.weight.name, layer.channel_axis) for layer in layers} <= changed


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(8)))
def test_positions_say_which_array_goes_where(order):
    """The arrays by hand, for a dense block."""

    def build(net, x):
        a = net.conv("a", x, 8)
        return net.finish(y=net.conv("c", net.call("both", R.concat([net.conv("b", a, 6), a], 1)), 4))

    mod = small(build)
    group = group_of(mod, "a.weight", 0)
    assert places(group)["c.weight", 1] == [[6 + i] for i in range(8)]
    old, new = weights_of(mod), permuted_weights(weights_of(mod), group, np.array(order))
    np.testing.assert_array_equal(new["a.weight"], old["a.weight"][order])
    np.testing.assert_array_equal(new["a.bias"], old["a.bias"][:, order])
    np.testing.assert_array_equal(new["b.weight"], old["b.weight"][:, order])
    np.testing.assert_array_equal(new["c.weight"][:, 6:], old["c.weight"][:, 6:][:, order])
    np.testing.assert_array_equal(new["c.weight"][:, :6], old["c.weight"][:, :6])


def small(build):
    net = Network()
    return build(net, net.input("x", (1, 4, 3, 3)))


def test_a_group_of_two_layers():
    def build(net, x):
        return net.finish(y=net.conv("b", net.relu("relu", net.conv("a", x, 5)), 2, bias=False))

    read, group, written = find_channel_groups(small(build))
    each = [[i] for i in range(5)]
    assert places(group, "producer") == {("a.weight", 0): each}
    assert places(group, "along") == {("a.bias", 1): each}
    assert places(group, "consumer") == {("b.weight", 1): each}
    assert (group.kind, group.channels, group.fixed, group.not_removable) == ("channels", 5, None, None)
    assert [(slot.var.name, slot.axis) for slot in group.tensors] == [("a", 1), ("a.biased", 1), ("relu", 1)]
    assert (places(read), read.fixed) == (
        {("a.weight", 1): [[0], [1], [2], [3]]},
        "it comes from the model's input 'x'",
    )
    assert (written.fixed, written.not_removable) == (None, "it is an output of the model")
    assert [slot.var.name for slot in written.outputs] == ["b"]


def test_a_channel_is_as_many_features_as_it_has_pixels():
    def build(net, x):
        x = net.call("flat", R.reshape(net.conv("a", x, 2), (1, 18)))
        return net.finish(y=net.linear("b", x, 2))

    mod = small(build)
    assert places(group_of(mod, "a.weight", 0))["b.weight", 0] == [list(range(9)), list(range(9, 18))]


def test_channels_last_features_are_spread():
    def build(net, x):
        x = net.call("last", R.permute_dims(net.conv("a", x, 2), [0, 2, 3, 1]))
        return net.finish(y=net.linear("b", net.call("flat", R.reshape(x, (1, 18))), 2))

    mod = small(build)
    assert places(group_of(mod, "a.weight", 0))["b.weight", 0] == [list(range(0, 18, 2)), list(range(1, 18, 2))]


def test_groups_of_a_convolution_keep_equal_counts():
    def build(net, x):
        return net.finish(y=net.conv("c", net.conv("b", net.conv("a", x, 6), 4, groups=2), 1))

    mod = small(build)
    read, written = group_of(mod, "b.weight", 1), group_of(mod, "b.weight", 0)
    assert places(read) == {("a.weight", 0): [[0, 3], [1, 4], [2, 5]], ("a.bias", 1): [[0, 3], [1, 4], [2, 5]],
                            ("b.weight", 1): [[0], [1], [2]]}  # fmt: skip
    assert places(written)["b.weight", 0] == places(written)["c.weight", 1] == [[0, 2], [1, 3]]


def test_channels_of_a_shuffle_move_but_none_can_go():
    """Without groups nothing says that as many must go of each part, and a reshape needs that."""
    group = group_of(NETWORKS["shuffled"](), "wide.weight", 0)
    assert group.fixed is None
    assert "along several axes" in group.not_removable


def test_a_softmax_over_parts_fixes():
    """Categorical latents: each row of eight sums to one, so no channel may change rows."""
    net = Network()
    y = net.call("parts", R.reshape(net.linear("latent", net.input("x", (1, 6)), 32), (1, 4, 8)))
    y = net.call("softmax", R.nn.softmax(y, -1))
    mod = net.finish(y=net.linear("out", net.call("flat", R.reshape(y, (1, 32))), 6))
    group = group_of(mod, "latent.weight", 1)
    assert "nn.softmax 'softmax' reads it, which sums over some of its channels" in group.fixed


def test_heads_are_groups_at_two_scales():
    mod = NETWORKS["transformer"]()
    heads = group_of(mod, "att.out.weight", 0, "heads")
    blocks = [[4 * head + i for i in range(4)] for head in range(4)]
    assert (heads.channels, heads.fixed, heads.not_removable) == (4, None, None)
    assert set(places(heads, "producer")) == {(f"att.{part}.weight", 1) for part in "qkv"}
    assert all(positions == blocks for positions in places(heads).values())
    inside = [group for group in find_channel_groups(mod) if group.kind == "head"]
    assert len(inside) == 8
    of_queries = [group for group in inside if ("att.q.weight", 1) in places(group)]
    assert [places(group)["att.q.weight", 1] for group in of_queries] == [[[i] for i in block] for block in blocks]
    assert all(places(group)["att.k.weight", 1] == places(group)["att.q.weight", 1] for group in of_queries)
    assert all("the same size" in group.not_removable for group in inside)


def test_a_residual_stream_is_one_group_down_to_the_output():
    stream = group_of(NETWORKS["transformer"](), "table.weight", 1)
    assert {"positions", "norm0.weight", "norm2.bias", "rms.weight", "down.bias"} <= {
        slot.weight for slot in stream.slots
    }
    assert [slot.var.name for slot in stream.outputs] == ["pooled"]
    assert stream.fixed is None
    assert "nn.layer_norm 'norm0' takes statistics over it" in stream.not_removable


def reason(build, weight="a.weight", axis=0):
    return group_of(small(build), weight, axis).fixed


def test_operators_that_are_not_understood_fix_what_they_read():
    def build(net, x):
        x = net.call("sums", R.cumsum(net.conv("a", x, 4), 1))
        return net.finish(y=net.conv("b", x, 2))

    assert reason(build) == "cumsum 'sums' reads it, which orders or mixes its channels"
    assert reason(build, "b.weight", 1) == "it comes from the result of cumsum 'sums'"


def test_what_is_added_from_an_input_fixes():
    def build(net, x):
        return net.finish(y=net.conv("b", net.add("sum", net.conv("a", x, 4), x), 2))

    assert reason(build) == "add 'sum' combines it with the model's input 'x'"


def test_products_along_another_axis_fix():
    def build(net, x):
        mixed = net.call("mixed", R.matmul(net.conv("a", x, 4), net.call("turned", R.permute_dims(x, [0, 1, 3, 2]))))
        return net.finish(y=net.conv("b", mixed, 2))

    assert "matmul 'mixed' reads it, and its weight is quantized already or not a parameter" in reason(build)


def test_a_weight_that_is_also_read_elsewhere_is_fixed():
    def build(net, x):
        weight = net.weight("a.weight", np.ones((4, 4, 1, 1), np.float32))
        y = net.conv("b", net.relu("relu", net.conv("a", x, 4, weight=weight)), 2)
        return net.finish(y=y, w=net.call("total", R.cumsum(weight, 0)))

    assert reason(build) == "a.weight is shared with total, which needs its order"


def test_an_output_that_is_read_on_is_fixed():
    def build(net, x):
        y = net.relu("relu", net.conv("a", x, 4))
        return net.finish(y=y, z=net.conv("b", y, 2))

    assert reason(build) == "it is an output of the model"


def test_quantized_layers_are_fixed():
    def build(net, x):
        return net.finish(y=net.conv("b", net.relu("relu", net.conv("a", x, 8)), 8))

    mod = small(build)
    samples = {"x": np.random.default_rng(0).standard_normal((2, 4, 3, 3)).astype(np.float32)}
    for group in find_channel_groups(Quantize()(Calibrate(samples)(mod))):
        assert group.fixed is not None


def test_an_order_must_be_one():
    group = group_of(NETWORKS["mobile"](), "stem.weight", 0)
    with pytest.raises(ValueError, match="no such order"):
        permuted_weights(weights_of(NETWORKS["mobile"]()), group, np.array([0, 0, 1, 2, 3, 4, 5, 6]))
