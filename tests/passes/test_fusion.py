"""Which chains become one kernel, and where they end."""

import numpy as np
import pytest
from lowering import Net, QuantizedNet
from tvm import relax

from pumice.passes.fusion import Graph, Quant, fuse

SAME = (1, 1, 1, 1)


def chains_of(net, *outputs):
    """The chains by layer name, and the operators of each."""
    graph = Graph(net.module(*outputs))
    chains = fuse(graph)
    seen = [var for chain in chains for var in chain.members]
    assert len(seen) == len(set(seen)), "a variable is in two chains"
    for chain in chains:
        assert chain.members[0].same_as(chain.layer.var) and chain.members[-1].same_as(chain.result)
    return {chain.layer.name: (chain, [graph.flow.op(var) for var in chain.members]) for chain in chains}


def test_bias_activation_and_quantize():
    net = QuantizedNet(1, 8, 5, 6)
    chain, operators = chains_of(net, net.conv_layer(net.start(), "a", 8, padding=SAME, relu=True).var)["a"]
    assert operators == ["nn.conv2d", "add", "nn.relu", "quantize"]
    assert (chain.low, chain.high) == (0.0, float("inf"))
    assert chain.input_quant == Quant(float(np.float32(0.03)), 100)
    assert chain.bias is not None and chain.bias.shape == (8,) and chain.quant is not None


def test_signed_parameters_move_to_unsigned_bytes():
    net = QuantizedNet(1, 8, 5, 6)
    x = net.start(zero_point=100, signed=True)
    chain, _ = chains_of(net, net.conv_layer(x, "a", 8, signed=True).var)["a"]
    assert chain.input_quant.zero_point == 100


@pytest.mark.parametrize("rounds", [False, True])
def test_a_residual_is_added_in_the_accumulator(rounds):
    net = QuantizedNet(1, 8, 5, 6)
    x = net.start()
    y = net.conv_layer(x, "a", 8, padding=SAME, residual=x, rounds_before_add=rounds, relu=True)
    chain, operators = chains_of(net, y.var)["a"]
    between = ["quantize", "dequantize"] if rounds else []
    assert operators == ["nn.conv2d", "add", *between, "add", "nn.relu", "quantize"]
    assert chain.residual.same_as(x.var) and chain.is_complete


def test_two_layers_into_one_add():
    """One of them takes the add; the other is its operand."""
    net = QuantizedNet(1, 8, 5, 6)
    x = net.start()
    other = net.conv_layer(x, "short", 8, 1)
    y = net.conv_layer(x, "main", 8, padding=SAME, residual=other, rounds_before_add=True)
    found = chains_of(net, y.var)
    assert [operators.count("add") for _, operators in found.values()] == [2, 1] or [
        operators.count("add") for _, operators in found.values()
    ] == [1, 2]


def test_rounded_bytes_are_added_by_the_other_layer():
    """The sum of a rounded and an unrounded result belongs to the layer that was not rounded."""
    net = QuantizedNet(1, 8, 5, 6)
    x = net.start()
    short = net.conv_layer(x, "short", 8, 1)
    found = chains_of(net, net.conv_layer(x, "down", 8, residual=short, relu=True, padding=SAME).var)
    assert found["short"][1] == ["nn.conv2d", "add", "quantize"]
    assert found["down"][1] == ["nn.conv2d", "add", "add", "nn.relu", "quantize"]


def test_an_add_of_a_value_to_itself_is_no_residual():
    net = QuantizedNet(1, 8, 5, 6)
    y = net.conv_layer(net.start(), "a", 8, padding=SAME)
    total = net.emit(relax.op.add(y.var, y.var))
    _, operators = chains_of(net, net.rounded(total, y.q, 0.1, 3).var)["a"]
    assert operators == ["nn.conv2d", "add", "quantize"]


def test_a_value_with_two_readers_ends_the_chain():
    net = Net(x=(1, 4, 5, 5))
    y = net.conv(net.inputs["x"], "a", 6)
    z = net.emit(relax.op.nn.relu(y))
    _, operators = chains_of(net, net.emit(relax.op.tanh(y)), z)["a"]
    assert operators == ["nn.conv2d", "add"]


def test_an_output_of_the_model_ends_the_chain():
    net = Net(x=(1, 4, 5, 5))
    y = net.conv(net.inputs["x"], "a", 6)
    _, operators = chains_of(net, y, net.emit(relax.op.nn.relu(y)))["a"]
    assert operators == ["nn.conv2d", "add"]


def test_a_float_chain_has_no_quantize():
    net = Net(x=(1, 4, 5, 5))
    x = net.conv(net.inputs["x"], "a", 6)
    y = net.emit(relax.op.add(net.conv(x, "b", 6, padding=1), x))
    y = net.emit(relax.op.clip(net.emit(relax.op.nn.relu(y)), -1.0, 6.0))
    chain, operators = chains_of(net, y)["b"]
    assert operators == ["nn.conv2d", "add", "add", "nn.relu", "clip"]
    assert (chain.low, chain.high) == (0.0, 6.0) and chain.quant is None and chain.residual.same_as(x)


def test_nothing_is_added_after_an_activation():
    net = Net(x=(1, 4, 5, 5))
    x = net.conv(net.inputs["x"], "a", 6)
    y = net.emit(relax.op.nn.relu(net.conv(x, "b", 6, padding=1)))
    _, operators = chains_of(net, net.emit(relax.op.add(y, x)))["b"]
    assert operators == ["nn.conv2d", "add", "nn.relu"]


def test_an_int8_add_of_bytes_without_a_quantize_is_left_out():
    """The kernel adds bytes into bytes; a sum of them that stays float is not one of its outputs."""
    net = QuantizedNet(1, 8, 5, 6)
    x = net.start()
    weight, _, _ = net.weight("a", (8, 8, 1, 1), 0, 1.0)
    y = net.emit(relax.op.nn.conv2d(x.var, weight))
    _, operators = chains_of(net, net.emit(relax.op.tanh(net.emit(relax.op.add(y, x.var)))))["a"]
    assert operators == ["nn.conv2d"]


def test_an_int8_layer_adds_floats_into_floats():
    """The residual stream of a transformer; what is quantized after it is quantized by somebody else."""
    net = QuantizedNet(4, 8)
    x = net.start()
    weight, _, _ = net.weight("a", (8, 8), 1, 1.0)
    y = net.emit(relax.op.matmul(x.var, weight))
    total = net.emit(relax.op.add(y, net.inputs["x"]))
    chain, operators = chains_of(net, net.rounded(total, x.q, 0.1, 3).var)["a"]
    assert operators == ["matmul", "add"]
    assert chain.residual.same_as(net.inputs["x"]) and chain.residual_quant is None and chain.quant is None


def test_float_tokens_take_their_residual_along():
    net = Net(x=(4, 8))
    x = net.inputs["x"]
    _, operators = chains_of(net, net.emit(relax.op.add(net.linear(x, "a", 8), x)))["a"]
    assert operators == ["matmul", "add", "add"]


@pytest.mark.parametrize("operator", ["nn.gelu", "nn.gelu_tanh", "nn.silu", "sigmoid", "tanh"])
def test_activations_run_before_the_rounding(operator):
    net = QuantizedNet(4, 8)
    x = net.start()
    weight, _, _ = net.weight("a", (8, 8), 1, 1.0)
    y = net.emit(relax.op.matmul(x.var, weight))
    function = relax.op.nn if operator.startswith("nn.") else relax.op
    y = net.emit(getattr(function, operator.removeprefix("nn."))(y))
    chain, operators = chains_of(net, net.rounded(y, x.q, 0.1, 3).var)["a"]
    assert operators == ["matmul", operator, "quantize"] and chain.activation == operator


def test_nothing_is_added_after_a_function():
    net = Net(x=(1, 4, 5, 5))
    x = net.conv(net.inputs["x"], "a", 6)
    y = net.emit(relax.op.nn.gelu(net.conv(x, "b", 6, padding=1)))
    y = net.emit(relax.op.nn.relu(net.emit(relax.op.add(y, x))))
    chain, operators = chains_of(net, y)["b"]
    assert operators == ["nn.conv2d", "add", "nn.gelu"] and chain.activation == "nn.gelu"


def test_what_is_added_must_be_one_number_a_channel():
    net = Net(x=(1, 4, 5, 5))
    y = net.conv(net.inputs["x"], "a", 6, bias=False)
    y = net.emit(relax.op.add(y, net.floats("plane", 1, 1, 3, 3)))
    chain, operators = chains_of(net, net.emit(relax.op.nn.relu(y)))["a"]
    assert operators == ["nn.conv2d"] and chain.bias is None


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_a_bias_has_one_number_a_channel(shape):
    net = Net(x=(1, 4, 5, 5))
    y = net.conv(net.inputs["x"], "a", 6, bias=False)
    y = net.emit(relax.op.add(y, net.floats("bias", *shape)))
    chain, _ = chains_of(net, y)["a"]
    np.testing.assert_array_equal(chain.bias, np.broadcast_to(net.parameters["bias"][1].ravel(), 6))


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        ([("clip", -3.0, -1.0), ("relu",)], (0.0, 0.0)),
        ([("relu",), ("clip", -2.0, 6.0)], (0.0, 6.0)),
        ([("clip", 0.0, 6.0), ("clip", 7.0, 9.0)], (7.0, 7.0)),
        ([("clip", 1.0, 6.0), ("relu",)], (1.0, 6.0)),
    ],
)
def test_activations_compose(steps, want):
    net = Net(x=(1, 4, 5, 5))
    y = net.conv(net.inputs["x"], "a", 6)
    for step in steps:
        y = net.emit(relax.op.nn.relu(y) if step[0] == "relu" else relax.op.clip(y, *step[1:]))
    chain, _ = chains_of(net, y)["a"]
    x = np.linspace(-10, 10, 41)
    got = np.minimum(np.maximum(x, chain.low), chain.high)
    expected = x
    for step in steps:
        expected = np.maximum(expected, 0) if step[0] == "relu" else np.clip(expected, *step[1:])
    np.testing.assert_array_equal(got, expected)
    assert (chain.low, chain.high) == want


def test_bytes_of_bounds_saturate():
    quant = Quant(0.5, 10)
    assert [quant.store(v) for v in (float("-inf"), -100.0, 0.0, 1.0, 0.25, 0.75, 1e9, float("inf"))] == [
        0, 0, 10, 12, 10, 12, 255, 255,
    ]  # fmt: skip
