"""Attention from module to numbers: what stays packed, beside TVM's own lowering of the same operators."""

import math

import numpy as np
import pytest
from lowering import Net, kernels_called, run_net
from running import run_module
from tvm import relax
from tvm.relax import op

BATCH, QUERIES, KEYS, HEADS, SIZE = 2, 21, 18, 3, 8
WIDTH = HEADS * SIZE


def attend(net, q, k, v, bias=None):
    """``nn.attention`` of projections ``[B, T, H*C]``."""
    q, k, v = (net.emit(op.reshape(x, (BATCH, int(x.ty.shape[1]), HEADS, -1))) for x in (q, k, v))
    return net.emit(op.nn.attention(q, k, v, bias))


def projected(net):
    x, memory = net.inputs["x"], net.inputs["memory"]
    return net.linear(x, "q", WIDTH), net.linear(memory, "k", WIDTH), net.linear(memory, "v", WIDTH)


def joined(net, heads):
    return net.emit(op.reshape(heads, (BATCH, QUERIES, WIDTH)))


def network(**more):
    return Net(x=(BATCH, QUERIES, 16), memory=(BATCH, KEYS, 12), **more)


def check(net, *outputs, kernels, tolerance=2e-5):
    """As TVM computes it; ``kernels`` are all that runs besides reshapes."""
    got, lowered = run_net(net, *outputs)
    for y, want in zip(got, run_module(net.module(*outputs), net.feeds()), strict=True):
        np.testing.assert_allclose(y, want, rtol=tolerance, atol=tolerance * max(1, np.abs(want).max()))
    called = [name.split("_")[0] for name in kernels_called(lowered) if name != "reshape"]
    assert called == kernels.split()


def test_between_layers_nothing_is_unpacked():
    net = network(mask=(BATCH, 1, 1, KEYS))
    y = net.linear(joined(net, attend(net, *projected(net), net.inputs["mask"])), "out", 20)
    check(net, y, kernels="pack layer pack layer layer pack attention layer unpack")


def test_one_projection_for_all():
    net = network()
    qkv = net.linear(net.inputs["x"], "qkv", 3 * WIDTH)
    parts = [net.emit(op.strided_slice(qkv, [2], [i * WIDTH], [(i + 1) * WIDTH])) for i in range(3)]
    y = net.linear(joined(net, attend(net, *parts)), "out", 20)
    check(net, y, kernels="pack layer attention layer unpack")


def test_heads_that_are_read_as_they_are_too():
    net = network()
    heads = attend(net, *projected(net))
    check(net, heads, net.linear(joined(net, heads), "out", 20),
          kernels="pack layer pack layer layer attention unpack layer unpack")  # fmt: skip


def test_operands_that_no_layer_made_and_a_bias_that_is_a_weight():
    net = Net(x=(BATCH, QUERIES, WIDTH), memory=(BATCH, KEYS, WIDTH))
    x, memory = net.inputs["x"], net.inputs["memory"]
    bias = net.floats("bias", 1, HEADS, QUERIES, KEYS)
    turned = net.emit(op.permute_dims(net.emit(op.reshape(memory, (BATCH, KEYS, SIZE, HEADS))), [0, 1, 3, 2]))
    q, k = (net.emit(op.reshape(one, (BATCH, -1, HEADS, SIZE))) for one in (x, memory))
    y = net.emit(op.nn.attention(q, k, turned, bias))
    check(net, y, kernels="transpose pack pack pack attention unpack")


def test_a_guard_goes_into_the_kernel():
    net = network(mask=(BATCH, 1, QUERIES, KEYS))
    mask = net.emit(op.where(net.emit(op.greater(net.inputs["mask"], relax.const(1.5, "float32"))),
                             relax.const(0.0, "float32"), relax.const(-math.inf, "float32")))  # fmt: skip
    heads = attend(net, *projected(net), mask)
    seen = net.emit(op.astype(net.emit(op.not_equal(mask, relax.const(-math.inf, "float32"))), "int8"))
    most = net.emit(op.max(seen, [3], keepdims=True))
    hidden = net.emit(op.permute_dims(net.emit(op.equal(most, relax.const(0, "int8"))), [0, 2, 1, 3]))
    y = joined(net, net.emit(op.where(hidden, relax.const(0.0, "float32"), heads)))
    got, lowered = run_net(net, y)
    want = run_module(net.module(y), net.feeds())[0]
    assert (want == 0).all(-1).any() and np.isfinite(want).all()
    np.testing.assert_allclose(got[0], want, rtol=2e-5, atol=2e-5 * np.abs(want).max())
    called = [name for name in kernels_called(lowered) if name != "reshape"]
    assert called[-2:] == ["attention", "unpack"] and not any("max" in name for name in called)


@pytest.mark.parametrize("quantized_first", [False, True])
def test_the_result_is_rounded_in_the_kernel(quantized_first):
    net = network()
    parameters = relax.const(np.float32(0.05), "float32"), relax.const(120, "uint8")

    def rounded(var):
        stored = net.emit(op.quantize(var, *parameters, axis=0, out_dtype="uint8"))
        return net.emit(op.dequantize(stored, *parameters, axis=0, out_dtype="float32"))

    heads = attend(net, *projected(net))
    y = joined(net, rounded(heads)) if quantized_first else rounded(joined(net, heads))
    got, lowered = run_net(net, y)
    want = run_module(net.module(y), net.feeds())[0]
    assert np.abs(got[0] - want).max() < 0.051 and (np.abs(got[0] - want) > 1e-5).mean() < 0.01  # ties may differ
    assert [name.split("_")[0] for name in kernels_called(lowered)].count("attention") == 1
    assert not any(name.startswith("quantize") for name in kernels_called(lowered))
