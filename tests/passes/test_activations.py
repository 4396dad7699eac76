"""Activation functions are found however they are spelled, and only where nobody else needs what is inside."""

import numpy as np
import pytest
from lowering import Net
from tvm import relax
from tvm.relax import op

from pumice.passes.activations import activation_after
from pumice.passes.fusion import Graph


def c(value):
    return relax.const(np.float32(value), "float32")


def gate(e, x):
    return e(op.clip(e(op.add(x, c(3.0))), 0.0, 6.0))


SPELLINGS = {
    "hard_swish": [
        lambda e, x: op.divide(e(op.multiply(x, gate(e, x))), c(6.0)),
        lambda e, x: op.multiply(x, e(op.divide(gate(e, x), c(6.0)))),
        lambda e, x: op.multiply(e(op.multiply(gate(e, x), c(1 / 6))), x),
    ],
    "hard_sigmoid": [
        lambda e, x: op.divide(gate(e, x), c(6.0)),
        lambda e, x: op.clip(e(op.add(e(op.multiply(x, c(1 / 6))), c(0.5))), 0.0, 1.0),
    ],
    "nn.silu": [lambda e, x: op.nn.silu(x), lambda e, x: op.multiply(e(op.sigmoid(x)), x)],
    "nn.gelu": [
        lambda e, x: op.nn.gelu(x),
        lambda e, x: op.multiply(
            e(op.multiply(x, c(0.5))), e(op.add(e(op.erf(e(op.multiply(x, c(np.sqrt(0.5)))))), c(1.0)))
        ),
    ],
    "nn.gelu_tanh": [lambda e, x: op.nn.gelu_tanh(x)],
    "nn.leakyrelu": [
        lambda e, x: op.nn.leakyrelu(x, 0.2),
        lambda e, x: op.maximum(x, e(op.multiply(c(0.2), x))),
        lambda e, x: op.add(e(op.multiply(x, c(0.6))), e(op.multiply(e(op.abs(x)), c(0.4)))),
    ],
    "tanh": [lambda e, x: op.tanh(x)],
    "sigmoid": [
        lambda e, x: op.sigmoid(x),
        lambda e, x: op.divide(c(1.0), e(op.add(e(op.exp(e(op.negative(x)))), c(1.0)))),
    ],
}
CASES = [(name, i) for name, spellings in SPELLINGS.items() for i in range(len(spellings))]


def found(net, start, *outputs):
    return activation_after(Graph(net.module(*outputs)), start)


@pytest.mark.parametrize(("name", "index"), CASES)
def test_every_spelling(name, index):
    net = Net(x=(2, 8))
    y = net.linear(net.inputs["x"], "a", 8)
    z = net.emit(SPELLINGS[name][index](net.emit, y))
    activation = found(net, y, net.emit(op.exp(z)))
    assert activation is not None and activation.name == name
    assert activation.members[-1].same_as(z)
    assert activation.parameters == (pytest.approx((0.2,)) if name == "nn.leakyrelu" else ())


@pytest.mark.parametrize(
    "build",
    [
        lambda e, x: op.multiply(x, gate(e, x)),  # six times hard swish
        lambda e, x: op.clip(x, 0.0, 6.0),
        lambda e, x: op.multiply(x, e(op.sigmoid(e(op.multiply(x, c(1.702)))))),
        lambda e, x: op.nn.softmax(x),
        lambda e, x: op.multiply(x, x),
        lambda e, x: op.nn.relu(x),
        lambda e, x: op.multiply(x, c(1.0)),
        lambda e, x: op.minimum(x, e(op.multiply(x, c(0.2)))),  # leaks above zero
    ],
)
def test_what_is_none(build):
    net = Net(x=(2, 8))
    y = net.linear(net.inputs["x"], "a", 8)
    assert found(net, y, net.emit(build(net.emit, y))) is None


def test_what_else_is_read_is_not_swallowed():
    net = Net(x=(2, 8))
    y = net.linear(net.inputs["x"], "a", 8)
    gates = net.emit(op.sigmoid(y))
    silu = net.emit(op.multiply(y, gates))
    assert found(net, y, silu, gates) is None  # the gates leave the model
    assert found(net, y, silu, y) is None
    other = net.emit(op.add(gates, net.inputs["x"]))
    assert found(net, y, silu, other) is None  # or are read by another operator
