"""Blocks of ``main``, and what crosses their borders, by brute force over the graph."""

import pytest
from network import Network, residual_network
from token_encoder import token_encoder
from tvm.relax import op as R

from pumice.passes.dataflow import Dataflow, operands
from pumice.passes.segments import independent, segments


def layer_names(parts):
    return [[layer.name for layer in part.layers] for part in parts]


def test_residual_blocks_are_cut_where_they_end():
    parts = segments(residual_network())
    assert layer_names(parts) == [["stem"], ["a1", "a2"], ["b0", "b1", "b2"], ["fc"]]
    assert [[var.name for var in part.live_in] for part in parts] == [["image"], ["pool"], ["a.relu"], ["mean"]]
    assert [[var.name for var in part.live_out] for part in parts][:-1] == [["pool"], ["a.relu"], ["mean"]]


def test_an_encoder_is_cut_behind_attention_and_behind_feed_forward():
    mod = token_encoder()
    parts = segments(mod)
    assert layer_names(parts) == [
        ["q0", "k0", "v0", "out0"],
        ["up0", "down0"],
        ["q1", "k1", "v1", "out1"],
        ["up1", "down1"],
    ]
    assert [[var.name for var in part.live_in] for part in parts] == [
        ["embedded", "bias"],
        ["norm0"],
        ["last0", "bias"],
        ["norm1", "weight", "count"],
    ]
    assert {var.name for var, _ in independent(mod)} >= {"looked_up", "embedded", "bias"}
    assert layer_names(segments(mod, 6)) == [
        layer_names(parts)[0] + ["up0", "down0"],
        layer_names(parts)[2] + ["up1", "down1"],
    ]


@pytest.mark.parametrize("least", [1, 2, 3, 100])
@pytest.mark.parametrize("make", [residual_network, token_encoder])
def test_every_binding_is_in_one_piece_and_only_what_is_named_crosses(make, least):
    mod = make()
    flow, parts, rest = Dataflow(mod), segments(mod, least), independent(mod)
    placed = [var for var, _ in rest] + [var for part in parts for var, _ in part.bindings]
    named = [var for var in flow.value if flow.op(var)]
    assert sorted(flow.order[var] for var in placed) == sorted(flow.order[var] for var in named)
    before = {var for var, _ in rest} | set(flow.inputs)
    crossing: set = set()
    for part in parts:
        made = {var for var, _ in part.bindings}
        read = {v for _, value in part.bindings for v in operands(value)} - made - flow.weights
        assert read == set(part.live_in) and read <= before | crossing
        assert len(part.layers) >= least or len(parts) == 1
        crossing = set(part.live_out)
    assert crossing <= flow.outputs


def test_an_activation_that_stays_live_forbids_a_cut():
    net = Network()
    x = net.input("x", (1, 8))
    first = net.linear("first", x, 8)
    second = net.relu("second.relu", net.linear("second", first, 8))
    mod = net.finish(y=net.add("sum", net.linear("third", second, 8), first))
    assert layer_names(segments(mod)) == [["first"], ["second", "third"]]


def test_an_output_on_the_way_crosses_no_cut():
    net = Network()
    first = net.relu("relu", net.linear("first", net.input("x", (1, 8)), 8))
    side = net.call("side", R.nn.softmax(first))
    mod = net.finish(y=net.linear("second", first, 4), side=side)
    parts = segments(mod)
    assert layer_names(parts) == [["first"], ["second"]]
    assert {var.name for var in parts[0].live_out} == {"relu", "side"}


def test_without_layers_there_is_no_segment():
    net = Network()
    mod = net.finish(y=net.relu("relu", net.input("x", (1, 8))))
    assert segments(mod) == []
    assert [var.name for var, _ in independent(mod)] == ["relu"]
