"""Transformer blocks: norms, residual sums and activations stay packed, and give the definition's numbers."""

import numpy as np
import pytest
import reference
from lowering import Net, QuantizedNet, kernels_called, run_net
from running import run_module
from tvm import relax

EPSILON = 1e-5


def norm(net, x, name, centres=True):
    channels = int(x.ty.shape[-1])
    gamma, beta = net.floats(f"{name}.weight", channels), net.floats(f"{name}.bias", channels)
    if centres:
        return net.emit(relax.op.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=EPSILON))
    return net.emit(relax.op.nn.rms_norm(x, gamma, axes=[-1], epsilon=EPSILON))


def float_linear(net, x, name, n):
    """An int8 layer whose output stays float: the variable, and its value by the definition without residual."""
    weight, wq, sw = net.weight(name, (x.q.shape[-1], n), 1, 0.6)
    acc = reference.linear_accumulate(x.q, x.zero_point, wq, np.zeros(n, np.int32))
    return net.emit(relax.op.matmul(x.var, weight)), acc, reference.multiplier(x.scale, sw)


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (40, 10)])
@pytest.mark.parametrize("centres", [True, False])
def test_linear_residual_norm_linear_equals_the_definition(shape, centres):
    """One layer kernel with the sum, one norm that writes floats and bytes, one layer kernel with the next sum."""
    net = QuantizedNet(*shape)
    x, n = net.start(), shape[-1]
    y, acc, m = float_linear(net, x, "a", n)
    total = net.emit(relax.op.add(y, net.inputs["x"]))
    normed = norm(net, total, "ln", centres)
    gamma, beta = (net.parameters[f"ln.{name}"][1] for name in ("weight", "bias"))
    real = reference.layer_float32(acc, m, net.feed).reshape(-1, n)
    real = reference.norm32(real, gamma, beta if centres else None, EPSILON).reshape(shape)
    scale, zero_point = float(np.float32(np.abs(real).max() / 120)), 128
    stored = net.rounded(normed, reference.norm_u8(real, scale, zero_point), scale, zero_point)
    z, acc, m = float_linear(net, stored, "b", n)
    z = net.emit(relax.op.add(z, normed))
    outputs, lowered = run_net(net, z, normed)
    np.testing.assert_array_equal(outputs[1], real)
    np.testing.assert_array_equal(outputs[0], reference.layer_float32(acc, m, real))
    called = kernels_called(lowered)
    assert called.count("packed_norm") == 1 and not {"pointwise", "quantize_packed", "add"} & set(called)
    first, second = [i for i, kernel in enumerate(called) if kernel.startswith("layer")]
    assert [name for name in called[first + 1 : second] if "norm" not in name] == []


@pytest.mark.parametrize("operator", ["gelu", "gelu_tanh", "silu", "sigmoid", "hard_swish", "leakyrelu"])
@pytest.mark.parametrize("shape", [(7, 12), (1, 12)])
def test_a_function_between_two_layers_equals_the_definition(operator, shape):
    net = QuantizedNet(*shape)
    x = net.start()
    y, acc, m = float_linear(net, x, "a", 20)
    if operator == "hard_swish":
        gate = net.emit(relax.op.clip(net.emit(relax.op.add(y, net.number(3.0))), 0.0, 6.0))
        y, name = net.emit(relax.op.divide(net.emit(relax.op.multiply(y, gate)), net.number(6.0))), operator
    else:
        name = operator if operator == "sigmoid" else f"nn.{operator}"
        y = net.emit(getattr(relax.op if operator == "sigmoid" else relax.op.nn, operator)(y))
    real = reference.FUNCTIONS[name](reference.layer_float32(acc, m))
    low = min(0.0, float(real.min()))
    scale = float(np.float32((real.max() - low) / 240))
    zero_point = int(-low / scale)
    q = reference.requantize(acc, m, zero_point, activation=name, sy=scale)
    stored = net.rounded(y, q, scale, zero_point)
    z, acc, m = float_linear(net, stored, "b", 9)
    outputs, lowered = run_net(net, z, stored.var)
    np.testing.assert_array_equal(outputs[1], stored.real)
    np.testing.assert_array_equal(outputs[0], reference.layer_float32(acc, m))
    assert not {"pointwise", "quantize_packed", "lookup"} & set(kernels_called(lowered))


@pytest.mark.parametrize("centres", [True, False])
@pytest.mark.parametrize("shape", [(6, 16), (1, 16), (2, 6, 18)])
def test_a_float_block(centres, shape):
    """Kept float: the residual stream is packed all the same."""
    net = Net(x=shape)
    x = net.inputs["x"]
    y = norm(net, net.emit(relax.op.add(net.linear(x, "a", shape[-1]), x)), "ln1", centres)
    z = net.linear(net.emit(relax.op.nn.gelu(net.linear(y, "b", 24))), "c", shape[-1])
    z = norm(net, net.emit(relax.op.add(z, y)), "ln2", centres)
    want = run_module(net.module(z), net.feeds())[0]
    outputs, lowered = run_net(net, z)
    np.testing.assert_allclose(outputs[0], want, rtol=2e-5, atol=2e-5)
    if shape[0] > 1:
        assert kernels_called(lowered).count("packed_norm") == 2
        assert "pointwise" not in kernels_called(lowered)


def test_a_norm_of_plain_rows_that_no_layer_reads():
    net = Net(x=(3, 5, 16))
    y = norm(net, net.emit(relax.op.nn.softmax(net.inputs["x"])), "ln")
    want = run_module(net.module(y), net.feeds())[0]
    outputs, lowered = run_net(net, y)
    np.testing.assert_allclose(outputs[0], want, rtol=1e-4, atol=1e-4)
    assert "layer_norm" in kernels_called(lowered)


def test_a_norm_over_the_rows_of_a_map_is_left_alone():
    net = Net(x=(1, 4, 5, 8))
    y = net.conv(net.inputs["x"], "a", 4, padding=1)
    y = net.conv(norm(net, y, "ln"), "b", 4)
    want = run_module(net.module(y), net.feeds())[0]
    np.testing.assert_allclose(run_net(net, y)[0][0], want, rtol=1e-4, atol=1e-4)
