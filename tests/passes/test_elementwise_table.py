"""Functions of one byte as tables: what is found, what is refused."""

import math

import numpy as np
import pytest
from lowering import NATIVE, QuantizedNet
from reference import quantize_u8
from tvm import relax

from pumice.passes.elementwise_table import table_of
from pumice.passes.fusion import Graph, Quant
from pumice.passes.packed import Builder, Packed
from pumice.schedules.geometry import Geometry

INPUT, OUTPUT = Quant(0.05, 90), Quant(0.02137, 30)  # no value lies between two bytes
STORED = (np.arange(256) - 90) * np.float64(INPUT.scale)


def table(make):
    """The table of ``make(net, x)``, None if there is none; ``x`` and ``other`` are known as packed bytes."""
    net = QuantizedNet(1, 8, 3, 3)
    x, other = (net.rounded(net.inputs["x"], net.feed, INPUT.scale, INPUT.zero_point).var for _ in range(2))
    var = make(net, x, other)
    builder = Builder(Graph(net.module(var)), {}, NATIVE, 1, {})
    for known in (x, other):
        expr = relax.Var("packed", relax.TensorType((2, 16, 4), "uint8"))
        builder.define(known, Packed(expr, 8, Geometry(1, 3, 3), INPUT))
    found = table_of(builder, var, OUTPUT)
    if found is None:
        return None
    assert found[1].dtype == np.uint8 and found[1].shape == (256,)
    return found[1]


UNARY = {
    "nn.relu": lambda x: np.maximum(x, 0),
    "nn.silu": lambda x: x / (1 + np.exp(-x)),
    "nn.gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "nn.gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "erf": np.vectorize(math.erf),
    "negative": np.negative,
    "abs": np.abs,
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "square": np.square,
}


@pytest.mark.parametrize("name", UNARY)
def test_unary_functions(name):
    operator = relax.op
    for part in name.split("."):
        operator = getattr(operator, part)
    got = table(lambda net, x, _: net.emit(operator(x)))
    np.testing.assert_array_equal(got, quantize_u8(UNARY[name](STORED), OUTPUT.scale, OUTPUT.zero_point))


def test_undefined_values_are_the_zero_point():
    got = table(lambda net, x, _: net.emit(relax.op.sqrt(x)))
    with np.errstate(invalid="ignore"):
        want = quantize_u8(np.sqrt(STORED), OUTPUT.scale, OUTPUT.zero_point)
    np.testing.assert_array_equal(got, want)
    assert (got[:90] == OUTPUT.zero_point).all()


def test_infinities_saturate():
    got = table(lambda net, x, _: net.emit(relax.op.divide(net.number(1.0), net.emit(relax.op.nn.relu(x)))))
    assert got[90] == 255


def test_a_value_may_be_read_twice():
    def hardswish(net, x, _):
        gate = net.emit(relax.op.clip(net.emit(relax.op.add(x, net.number(3.0))), 0.0, 6.0))
        return net.emit(relax.op.divide(net.emit(relax.op.multiply(x, gate)), net.number(6.0)))

    want = quantize_u8(STORED * np.clip(STORED + 3, 0, 6) / 6, OUTPUT.scale, OUTPUT.zero_point)
    np.testing.assert_array_equal(table(hardswish), want)


def test_a_scalar_weight_is_a_constant():
    got = table(lambda net, x, _: net.emit(relax.op.multiply(x, net.parameter("s", np.float32(0.5).reshape(1)))))
    np.testing.assert_array_equal(got, quantize_u8(STORED / 2, OUTPUT.scale, OUTPUT.zero_point))


@pytest.mark.parametrize(
    "make",
    [
        lambda net, x, other: net.emit(relax.op.add(x, other)),
        lambda net, x, _: net.emit(relax.op.multiply(x, net.floats("s", 1, 8, 1, 1))),
        lambda net, x, _: net.emit(relax.op.nn.softmax(x, axis=-1)),
        lambda net, x, _: net.emit(relax.op.permute_dims(x, [0, 2, 3, 1])),
        lambda net, x, _: net.emit(relax.op.add(x, net.inputs["x"])),
    ],
    ids=["two values", "a number a channel", "not elementwise", "moves", "a float value"],
)
def test_anything_else_is_no_table(make):
    assert table(make) is None
