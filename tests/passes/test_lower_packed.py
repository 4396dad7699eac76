"""Whole graphs through the lowering: quantized ones give the definition's integers, float ones TVM's numbers."""

import math

import numpy as np
import pytest
import reference
from lowering import Net, QuantizedNet, Value, kernels_called, parameters_for, run_lowered, run_net
from running import run_module
from tvm import relax

from pumice.module import layers_of, weight_vars_of, weights_of, with_layers
from pumice.passes.choose_kernel import Chooser, choose_slices
from pumice.record import LayerRecord
from pumice.schedules.tiling import DENSE, Form

SAME = (1, 1, 1, 1)


def check(net: QuantizedNet, *values: Value, **options):
    """Every output equals the definition; gives the lowered module."""
    outputs, lowered = run_net(net, *(value.var for value in values), **options)
    for got, value in zip(outputs, values, strict=True):
        np.testing.assert_array_equal(got, value.real)
    return lowered


def check_float(net: Net, *outputs, rtol=2e-5, **options):
    """As TVM's own pipeline computes it; gives the lowered module."""
    mod = net.module(*outputs)
    got, lowered = run_lowered(mod, net.feeds(), **options)
    for mine, want in zip(got, run_module(mod, net.feeds()), strict=True):
        assert mine.shape == want.shape and mine.dtype == want.dtype
        np.testing.assert_allclose(mine, want, rtol=rtol, atol=rtol * float(np.abs(want).max()) * 3)
    return lowered


def near_tvm(net: Net, value_scale: float, *outputs):
    """Within one quantization step of the graph as TVM computes it in float; gives the lowered module."""
    mod = net.module(*outputs)
    got, lowered = run_lowered(mod, net.feeds())
    for mine, want in zip(got, run_module(mod, net.feeds()), strict=True):
        assert mine.shape == want.shape and mine.dtype == want.dtype
        difference = np.abs(mine.astype(np.float64) - want.astype(np.float64))
        assert difference.max() <= value_scale * 1.001
        assert (difference > value_scale / 2).mean() < 0.05
    return lowered


# Layers, quantized: exactly the definition.

CONVOLUTIONS = {
    "valid": {},
    "same": {"padding": SAME, "relu": True},
    "strided": {"padding": SAME, "stride": (2, 2), "relu": True},
    "strided without padding": {"stride": (2, 1)},
    "uneven padding": {"padding": (0, 1, 2, 1)},
    "padding behind only": {"padding": (0, 0, 1, 1), "stride": (2, 2)},
    "dilated": {"padding": (2, 2, 2, 2), "dilation": (2, 2)},
    "grouped": {"padding": SAME, "groups": 2},
    "depthwise": {"padding": SAME, "groups": 12, "clip": (0.0, 6.0)},
    "depthwise strided": {"padding": SAME, "groups": 12, "stride": (2, 2)},
    "sparse": {"padding": SAME, "density": 0.2},
    "empty": {"padding": SAME, "density": 0.0},
    "clipped above zero": {"padding": SAME, "clip": (0.5, 2.0)},
    "signed": {"padding": SAME, "signed": True},
}


@pytest.mark.parametrize(("batch", "case"), [(1 + 2 * (i % 2), case) for i, case in enumerate(CONVOLUTIONS)])
def test_a_chain_of_convolutions_equals_the_definition(case, batch):
    """The second layer reads what the first left in its padding."""
    net = QuantizedNet(batch, 12, 9, 13)
    x = net.start(signed=case == "signed")
    first = net.conv_layer(x, "a", 12, **CONVOLUTIONS[case])
    lowered = check(net, net.conv_layer(first, "b", 7, padding=SAME, relu=True))
    assert layers_of(lowered)["a"].dtype == layers_of(lowered)["b"].dtype == "int8"
    assert "conv2d" not in "".join(kernels_called(lowered))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kernel", "size"), [(1, 1), (2, 2), (3, 3), (3, 1)])
def test_layers_that_end_in_one_pixel(kernel, size, batch):
    """The last stage of a network: a single position, strided or not."""
    for stride in (1, 2):
        net = QuantizedNet(batch, 8, size, size)
        x = net.start()
        padding = SAME if size < kernel else (0, 0, 0, 0)
        first = net.conv_layer(x, "a", 9, kernel, stride=(stride, stride), padding=padding, relu=True)
        assert first.q.shape[2:] == (1, 1)
        check(net, net.conv_layer(first, "b", 6, 1), net.conv_layer(first, "c", 5, 3, padding=SAME))


class InSlices(Chooser):
    """Does not ask what is faster."""

    def choose(self, work, isa):
        return choose_slices(work.numbers.rows, isa, self.forms, work.places.target.span)


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (3, 24, 1, 1), (1, 24, 2, 4), (2, 24, 2, 2)])
@pytest.mark.parametrize("density", [1.0, 0.1])
def test_layers_with_few_positions_equal_the_definition(shape, density):
    """Rows of a batch and pixels of a tiny map: their weights are streamed once."""
    net = QuantizedNet(*shape)
    layer = net.conv_layer if len(shape) == 4 else net.linear_layer
    kernel = (1,) if len(shape) == 4 else ()
    first = layer(net.start(), "a", 37, *kernel, density=density, relu=True)
    second = layer(first, "b", 37, *kernel, density=density, residual=first)
    lowered = check(net, second, chooser=InSlices((DENSE,) if density == 1.0 else (Form(1),)))
    assert all("gemv" in layer.kernel for layer in layers_of(lowered).values())


@pytest.mark.parametrize(("batch", "rounds_before_add"), [(1, True), (3, False)])
def test_residual_blocks_equal_the_definition(batch, rounds_before_add):
    net = QuantizedNet(batch, 6, 8, 10)
    stem = net.conv_layer(net.start(), "stem", 12, padding=SAME, relu=True)
    inner = net.conv_layer(stem, "inner", 12, padding=SAME, relu=True, density=0.3)
    block = net.conv_layer(
        inner, "outer", 12, padding=SAME, relu=True, residual=stem, rounds_before_add=rounds_before_add
    )
    short = net.conv_layer(block, "short", 8, 1, stride=(2, 2))
    down = net.conv_layer(block, "down", 8, 3, stride=(2, 2), padding=SAME, residual=short, relu=True)
    lowered = check(net, net.conv_layer(down, "last", 5, padding=SAME))
    assert [name for name in kernels_called(lowered) if name == "add"] == []


def test_a_residual_that_the_model_was_given_quantized():
    """The other operand is an input of the model that is stored as bytes."""
    net = QuantizedNet(1, 6, 5, 7)
    x = net.start()
    q = np.random.default_rng(3).integers(0, 256, (1, 8, 5, 7)).astype(np.uint8)
    stored = net.inputs["r"] = relax.Var("r", relax.TensorType(q.shape, "uint8"))
    other = Value(net.dequantize(stored, 0.02, 90), q, float(np.float32(0.02)), 90)
    y = net.conv_layer(x, "a", 8, padding=SAME, residual=other)
    outputs, _ = run_lowered(net.module(y.var), {**net.feeds(), "r": q})
    np.testing.assert_array_equal(outputs[0], y.real)


@pytest.mark.parametrize("shape", [(1, 20), (7, 20), (2, 5, 20), (1, 1, 20), (3, 1, 20), (1, 23), (6, 23)])
@pytest.mark.parametrize("density", [1.0, 0.2])
def test_a_chain_of_linear_layers_equals_the_definition(shape, density):
    net = QuantizedNet(*shape)
    first = net.linear_layer(net.start(), "a", 17, relu=True, density=density)
    second = net.linear_layer(first, "b", 17, residual=first)
    lowered = check(net, net.linear_layer(second, "c", 1, density=density))
    assert np.prod(shape[:-1]) > 1 or "gemv" in layers_of(lowered)["b"].kernel


def test_a_linear_layer_on_four_axes():
    """Channels are last although the shape looks like a feature map."""
    net = QuantizedNet(2, 3, 4, 8)
    near_tvm(net, 1e-4, net.linear_layer(net.start(), "a", 8).var)
    net = Net(x=(2, 3, 4, 8))
    y = net.linear(net.emit(relax.op.nn.relu(net.inputs["x"])), "a", 8)
    check_float(net, net.linear(net.emit(relax.op.nn.relu(y)), "b", 5))


def test_a_layer_whose_output_stays_float():
    net = QuantizedNet(3, 12)
    x = net.start()
    y = net.linear_layer(x, "a", 9)
    weight, wq, sw = net.weight("last", (9, 10), 1, 1.0)
    out = net.emit(relax.op.matmul(y.var, weight))
    outputs, _ = run_net(net, out)
    acc = reference.linear_accumulate(y.q, y.zero_point, wq, np.zeros(10, np.int32))
    np.testing.assert_array_equal(outputs[0], reference.layer_float32(acc, reference.multiplier(y.scale, sw)))


def test_a_quantized_output_is_returned_as_bytes():
    for signed in (False, True):
        net = QuantizedNet(2, 6, 5, 7)
        y = net.conv_layer(net.start(), "a", 6, padding=SAME, signed=signed)
        stored = next(b.value.args[0] for b in net.bindings if b.var.same_as(y.var))
        outputs, _ = run_net(net, stored, y.var)
        want = y.q.astype(np.int32) - 128 * signed
        assert outputs[0].dtype == (np.int8 if signed else np.uint8)
        np.testing.assert_array_equal(outputs[0], want)
        np.testing.assert_array_equal(outputs[1], y.real)


def test_a_value_that_is_read_packed_and_plain():
    net = QuantizedNet(1, 6, 5, 7)
    y = net.conv_layer(net.start(), "a", 6, padding=SAME)
    z = net.conv_layer(y, "b", 6, padding=SAME)
    turned = net.emit(relax.op.permute_dims(y.var, [0, 2, 3, 1]))
    outputs, _ = run_net(net, z.var, turned, y.var)
    np.testing.assert_array_equal(outputs[0], z.real)
    np.testing.assert_array_equal(outputs[1], y.real.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(outputs[2], y.real)


def test_tied_weights():
    net = QuantizedNet(4, 12)
    first = net.linear_layer(net.start(), "tied", 12, relu=True)
    lowered = check(net, net.linear_layer(first, "tied", 12))
    assert list(layers_of(lowered)) == ["tied", "tied#2"]


def test_a_dequantize_may_have_parameters_of_its_own():
    """The same bytes read by another scale and zero point stand for other numbers."""
    net = QuantizedNet(1, 8, 5, 6)
    stored = net.quantize(net.inputs["x"], 0.03, 100)
    q = reference.quantize_u8(net.feed, 0.03, 100)
    x = Value(net.dequantize(stored, 0.07, 60), q, float(np.float32(0.07)), 60)
    check(net, net.conv_layer(x, "a", 8, padding=SAME), x)


# Between layers, quantized.


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("size", "attrs"),
    [
        ((9, 11), {"pool_size": (3, 3), "strides": (2, 2), "padding": (1, 1)}),
        ((8, 12), {"pool_size": (2, 2), "strides": (2, 2)}),
        ((7, 9), {"pool_size": (2, 2), "strides": (2, 2), "ceil_mode": True}),
        ((9, 8), {"pool_size": (3, 3), "strides": (2, 2), "ceil_mode": True}),
        ((2, 2), {"pool_size": (2, 2), "strides": (2, 2)}),
        ((5, 5), {"pool_size": (5, 5), "strides": (1, 1), "padding": (2, 2)}),
    ],
)
def test_max_pooling(size, attrs, batch):
    """The maximum of the bytes: the scale stays, and what follows is still exact."""
    net = QuantizedNet(batch, 6, *size)
    y = net.conv_layer(net.start(), "a", 10, padding=SAME)
    var = net.emit(relax.op.nn.max_pool2d(y.var, **attrs))
    out = [int(d) for d in var.ty.shape][2:]
    pad, kernel, stride = attrs.get("padding", (0, 0)), attrs["pool_size"], attrs["strides"]
    behind = [(out[i] - 1) * stride[i] + kernel[i] - size[i] - pad[i] for i in (0, 1)]
    q = reference.maxpool_u8(y.q, kernel, stride, (*pad, *(max(0, b) for b in behind)))
    z = net.rounded(var, q, y.scale, y.zero_point)
    lowered = check(net, net.conv_layer(z, "b", 5, padding=SAME), z)
    assert "pooling" in kernels_called(lowered)


@pytest.mark.parametrize(
    ("size", "attrs"),
    [
        ((8, 12), {"pool_size": (2, 2), "strides": (2, 2)}),
        ((9, 11), {"pool_size": (3, 3), "strides": (2, 2), "padding": (1, 1), "count_include_pad": True}),
        ((9, 11), {"pool_size": (3, 3), "strides": (2, 2), "padding": (1, 1), "count_include_pad": False}),
        ((7, 9), {"pool_size": (2, 2), "strides": (2, 2), "ceil_mode": True}),
        ((2, 2), {"pool_size": (2, 2), "strides": (1, 1)}),
    ],
)
def test_average_pooling(size, attrs):
    net = QuantizedNet(2, 6, *size)
    y = net.conv_layer(net.start(), "a", 10, padding=SAME)
    var = net.emit(relax.op.nn.avg_pool2d(y.var, **attrs))
    z = net.rounded(var, y.q, y.scale * 0.8, 120)
    near_tvm(net, y.scale * 0.8, z.var)


def test_average_pooling_equals_the_definition():
    net = QuantizedNet(2, 6, 9, 11)
    y = net.conv_layer(net.start(), "a", 10, padding=SAME)
    attrs = {"pool_size": (3, 3), "strides": (2, 2), "padding": (1, 1), "count_include_pad": True}
    var = net.emit(relax.op.nn.avg_pool2d(y.var, **attrs))
    scale = float(np.float32(y.scale * 0.8))
    q = reference.avgpool_u8(y.q, y.zero_point, y.scale / scale, 120, (3, 3), (2, 2), SAME)
    z = net.rounded(var, q, scale, 120)
    lowered = check(net, net.conv_layer(z, "b", 5, padding=SAME), z)
    assert "pooling" in kernels_called(lowered)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("operator", ["mean", "mean keepdims", "adaptive"])
def test_global_average_then_linear(operator, batch):
    net = QuantizedNet(batch, 6, 5, 7)
    y = net.conv_layer(net.start(), "a", 10, padding=SAME, relu=True)
    scale = float(np.float32(y.scale * 0.6))
    q = reference.avgpool_u8(y.q, y.zero_point, y.scale / scale, 7, (5, 7))
    if operator == "adaptive":
        var = net.emit(relax.op.nn.adaptive_avg_pool2d(y.var, (1, 1)))
    else:
        var = net.emit(relax.op.mean(y.var, [2, 3], keepdims="keepdims" in operator))
    if len(var.ty.shape) == 4:
        var = net.emit(relax.op.reshape(var, (batch, 10)))
    z = net.rounded(var, q.reshape(batch, 10), scale, 7)
    lowered = check(net, net.linear_layer(z, "fc", 9), z)
    assert "global_average" in kernels_called(lowered)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [(8, 4, 5), (6, 4, 4)])
def test_concat_of_channels(channels, batch):
    net = QuantizedNet(batch, 6, 5, 7)
    x = net.start()
    parts = []
    for i, n in enumerate(channels):
        y = net.conv_layer(x, f"c{i}", n, padding=SAME)
        q = reference.quantize_u8(y.real, 0.05, 77)
        parts.append(net.rounded(y.var, q, 0.05, 77))
    var = net.emit(relax.op.concat([part.var for part in parts], axis=1))
    q = np.concatenate([part.q for part in parts], axis=1)
    z = net.rounded(var, q, 0.05, 77)
    check(net, net.conv_layer(z, "b", 5, padding=SAME), z)


def test_concat_of_parts_with_their_own_scales():
    net = QuantizedNet(1, 6, 5, 7)
    x = net.start()
    parts = [net.conv_layer(x, f"c{i}", 8, padding=SAME) for i in range(2)]
    var = net.emit(relax.op.concat([part.var for part in parts], axis=1))
    q = reference.quantize_u8(np.concatenate([part.real for part in parts], axis=1), 0.05, 77)
    z = net.rounded(var, q, 0.05, 77)
    check(net, net.conv_layer(z, "b", 5, padding=SAME))


def hardswish(net, x):
    gate = net.emit(relax.op.clip(net.emit(relax.op.add(x, net.number(3.0))), 0.0, 6.0))
    return net.emit(relax.op.divide(net.emit(relax.op.multiply(x, gate)), net.number(6.0)))


FUNCTIONS = {
    "hardswish": hardswish,
    "sigmoid": lambda net, x: net.emit(relax.op.sigmoid(x)),
    "silu": lambda net, x: net.emit(relax.op.nn.silu(x)),
    "gelu": lambda net, x: net.emit(relax.op.nn.gelu(x)),
    "exp": lambda net, x: net.emit(relax.op.exp(x)),
    "leaky": lambda net, x: net.emit(relax.op.nn.leakyrelu(x, 0.125)),
    "tanh": lambda net, x: net.emit(relax.op.tanh(x)),
}
NUMPY = {
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "exp": np.exp,
    "leaky": lambda x: np.where(x < 0, x / 8, x),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_one_value_are_tables(function):
    """One lookup; where zero does not stay zero the padding is made good for the next layer."""
    net = QuantizedNet(2, 6, 5, 7)
    y = net.conv_layer(net.start(), "a", 8, padding=SAME)
    var = FUNCTIONS[function](net, y.var)
    real = NUMPY[function](y.real.astype(np.float64))
    scale, zero_point = parameters_for(real)
    z = net.rounded(var, reference.quantize_u8(real, scale, zero_point), scale, zero_point)
    lowered = check(net, net.conv_layer(z, "b", 5, padding=SAME), z)
    assert kernels_called(lowered).count("lookup") == 1


@pytest.mark.parametrize("clip", [None, (0.5, 1.5)])
def test_add_of_two_quantized_values(clip):
    """An add that no layer can take; a clamp that leaves zero out must not reach the padding."""
    net = QuantizedNet(2, 6, 5, 7)
    y = net.conv_layer(net.start(), "a", 8, padding=SAME)
    pooled = net.emit(relax.op.nn.max_pool2d(y.var, pool_size=(3, 3), padding=(1, 1)))
    p = net.rounded(pooled, reference.maxpool_u8(y.q, (3, 3), (1, 1), SAME), y.scale, y.zero_point)
    total = net.emit(relax.op.add(p.var, y.var))
    real, lo, hi = p.real + y.real, 0, 255
    if clip is not None:
        total, real = net.emit(relax.op.clip(total, *clip)), np.clip(real, *clip)
    scale, zero_point = parameters_for(real)
    if clip is not None:
        lo, hi = (int(reference.quantize_u8(np.float32(bound), scale, zero_point)) for bound in clip)
    ratio = float(np.float32(y.scale / scale))
    q = reference.add_u8(p.q, p.zero_point, ratio, y.q, y.zero_point, ratio, zero_point, lo, hi)
    z = net.rounded(total, q, scale, zero_point)
    lowered = check(net, net.conv_layer(z, "b", 5, padding=SAME), z)
    assert "add" in kernels_called(lowered)


# What cannot be int8 runs as float, and says so.


def test_a_weight_with_a_zero_point_runs_as_float():
    net = QuantizedNet(1, 8, 5, 6)
    x = net.start()
    stored = net.parameter("a.weight", net.rng.integers(-100, 100, (8, 8, 3, 3)).astype(np.int8))
    scale = net.parameter("a.weight.scale", np.full(8, 0.01, np.float32))
    zeros = relax.const(np.full(8, 3, np.int8), "int8")
    weight = net.emit(relax.op.dequantize(stored, scale, zeros, axis=0, out_dtype="float32"))
    y = net.emit(relax.op.nn.conv2d(x.var, weight, padding=SAME))
    lowered = check_float(net, y)
    record = layers_of(lowered)["a"]
    assert record.kernel == "tvm" and "zero point" in record.reason


def test_a_layer_that_could_overflow_runs_as_float():
    net = QuantizedNet(2, 67_000)
    x = net.start()
    stored = net.parameter("a.weight", np.full((67_000, 4), 127, np.int8))
    scale = net.parameter("a.weight.scale", np.full(4, 1e-4, np.float32))
    zeros = relax.const(np.zeros(4, np.int8), "int8")
    y = net.emit(relax.op.matmul(x.var, net.emit(relax.op.dequantize(stored, scale, zeros, axis=1))))
    lowered = check_float(net, y, rtol=1e-4)
    record = layers_of(lowered)["a"]
    assert record.kernel == "tvm" and "overflow" in record.reason


def test_an_int8_weight_with_a_float_input_runs_in_float():
    net = QuantizedNet(2, 8, 6, 6)
    weight, _, _ = net.weight("a", (8, 8, 3, 3), 0, 1.0)
    lowered = check_float(net, net.emit(relax.op.nn.conv2d(net.inputs["x"], weight, padding=SAME)))
    record = layers_of(lowered)["a"]
    assert record.dtype == "float32" and "not quantized" in record.reason


# Float graphs: the numbers of TVM's own pipeline.


@pytest.mark.parametrize("batch", [1, 3])
def test_float_convolutions(batch):
    net = Net(x=(batch, 5, 9, 11))
    y = net.emit(relax.op.nn.relu(net.conv(net.inputs["x"], "a", 8, padding=1)))
    z = net.conv(y, "b", 8, padding=1, groups=4)
    z = net.emit(relax.op.nn.relu(net.emit(relax.op.add(z, y))))
    z = net.emit(relax.op.nn.max_pool2d(z, pool_size=(3, 3), strides=(2, 2), padding=(1, 1)))
    z = net.emit(relax.op.clip(net.conv(z, "c", 6, 3, strides=2, padding=1), 0.0, 6.0))
    z = net.emit(relax.op.reshape(net.emit(relax.op.nn.adaptive_avg_pool2d(z, (1, 1))), (batch, 6)))
    lowered = check_float(net, net.linear(z, "fc", 10))
    assert {record.dtype for record in layers_of(lowered).values()} == {"float32"}
    assert not any(record.kernel == "tvm" for record in layers_of(lowered).values())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float_functions_between_padded_convolutions(function):
    net = Net(x=(1, 5, 6, 7))
    net.number = QuantizedNet.number
    y = FUNCTIONS[function](net, net.conv(net.inputs["x"], "a", 6, padding=1))
    check_float(net, net.conv(y, "b", 4, padding=1), rtol=1e-4)


@pytest.mark.parametrize("operator", ["add", "subtract", "multiply", "divide"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 6, 1, 1)])
def test_float_arithmetic_with_constants_between_padded_convolutions(operator, shape):
    """What makes zero something else, or differs from channel to channel, is not done on padding."""
    net = Net(x=(1, 5, 6, 7))
    y = net.conv(net.inputs["x"], "a", 6, padding=1)
    constant = relax.const((np.arange(np.prod(shape, dtype=int)) + 1.5).astype(np.float32).reshape(shape), "float32")
    y = net.emit(getattr(relax.op, operator)(net.emit(relax.op.nn.relu(y)), constant))
    check_float(net, net.conv(y, "b", 4, padding=1))


@pytest.mark.parametrize("shape", [(1, 10), (1, 12), (3, 10), (2, 5, 10), (1, 1, 9)])
def test_float_linear_layers(shape):
    """Also with inputs that are not a multiple of four."""
    net = Net(x=shape)
    y = net.emit(relax.op.nn.gelu(net.linear(net.inputs["x"], "a", 17)))
    y = net.linear(y, "b", shape[-1])
    check_float(net, net.linear(net.emit(relax.op.nn.relu(y)), "c", 3), rtol=1e-4)


def test_a_transformer_block():
    """Projections quantized, attention in float, as the quantize pass leaves it."""
    net = QuantizedNet(2, 6, 16)
    x = net.start()
    heads = []
    for name in ("q", "k", "v"):
        y = net.linear_layer(x, name, 16).var
        y = net.emit(relax.op.reshape(y, (2, 6, 4, 4)))
        heads.append(net.emit(relax.op.permute_dims(y, [0, 2, 1, 3])))
    turned = net.emit(relax.op.permute_dims(heads[1], [0, 1, 3, 2]))
    scores = net.emit(relax.op.divide(net.emit(relax.op.matmul(heads[0], turned)), net.number(2.0)))
    mixed = net.emit(relax.op.matmul(net.emit(relax.op.nn.softmax(scores, axis=-1)), heads[2]))
    mixed = net.emit(relax.op.reshape(net.emit(relax.op.permute_dims(mixed, [0, 2, 1, 3])), (2, 6, 16)))
    y = net.emit(relax.op.add(x.var, mixed))
    gamma, beta = net.floats("ln.weight", 16), net.floats("ln.bias", 16)
    y = net.emit(relax.op.nn.layer_norm(y, gamma, beta, axes=[-1]))
    scale = 0.05
    z = net.rounded(y, np.zeros((2, 6, 16), np.uint8), scale, 128)
    near_tvm(net, scale, z.var)


@pytest.mark.parametrize("batch", [1, 3])
def test_flatten_of_a_map_before_a_linear_layer(batch):
    net = QuantizedNet(batch, 4, 4, 5)
    y = net.conv_layer(net.start(), "a", 6, padding=SAME, relu=True)
    var = net.emit(relax.op.reshape(y.var, (batch, 120)))
    z = Value(var, y.q.reshape(batch, 120), y.scale, y.zero_point)
    again = net.rounded(var, z.q, z.scale, z.zero_point)
    check(net, net.linear_layer(again, "fc", 10))


def test_single_pixels_are_not_reordered_by_a_reshape():
    net = Net(x=(2, 8, 1, 1))
    y = net.conv(net.inputs["x"], "a", 8, 1)
    check_float(net, net.emit(relax.op.reshape(y, (1, 8, 1, 2))), y)


def test_two_inputs_and_two_outputs():
    net = Net(a=(1, 4, 6, 6), b=(1, 4, 6, 6))
    left, right = net.conv(net.inputs["a"], "left", 8, padding=1), net.conv(net.inputs["b"], "right", 8, padding=1)
    check_float(net, net.emit(relax.op.add(left, right)), left)


# The module around it.


def test_records_are_kept_and_what_is_not_read_is_dropped():
    net = QuantizedNet(1, 8, 5, 6)
    y = net.conv_layer(net.start(), "a", 8, padding=SAME)
    net.emit(relax.op.nn.relu(net.inputs["x"]))  # nobody reads it
    mod = net.module(net.conv_layer(y, "b", 4).var)
    records = {"a": LayerRecord("a", "conv2d", "a.weight", (8, 8, 3, 3), pruned_by="side file", notes=["kept"])}
    _, lowered = run_lowered(with_layers(mod, records), net.feeds())
    after = layers_of(lowered)
    assert list(after) == ["a", "b"]
    assert after["a"].pruned_by == "side file" and after["a"].notes == ["kept"]
    for record in after.values():
        assert record.dtype == "int8" and record.kernel and record.reason and record.compiled_bytes > 0
    names = {var.name for var in weight_vars_of(lowered)}
    assert names == set(weights_of(lowered))
    assert not {"a.weight", "a.weight.scale", "a.bias"} & names
    assert "relu" not in "".join(kernels_called(lowered))


def test_equal_layers_share_one_kernel():
    net = QuantizedNet(1, 8, 5, 6)
    y = net.start()
    for _ in range(3):
        y = net.conv_layer(y, "tied", 8, padding=SAME)
    lowered = check(net, Value(y.var, y.q, y.scale, y.zero_point))
    assert len([name for name in kernels_called(lowered) if name.startswith("layer")]) == 3


def test_sparse_and_dense_agree_bit_for_bit():
    def net():
        net = QuantizedNet(2, 12, 6, 7)
        y = net.conv_layer(net.start(), "a", 12, padding=SAME, density=0.2, relu=True)
        return net, net.conv_layer(y, "b", 12, padding=SAME, density=0.2, residual=y)

    one, value = net()
    sparse, lowered = run_net(one, value.var)
    assert "sparse" in layers_of(lowered)["a"].kernel
    other, value = net()
    dense, lowered = run_net(other, value.var, chooser=Chooser((DENSE,)))
    assert layers_of(lowered)["a"].kernel.startswith("dense")
    np.testing.assert_array_equal(sparse[0], dense[0])


def test_threads_change_nothing():
    net = QuantizedNet(1, 64, 15, 15)
    y = net.conv_layer(net.start(), "a", 64, padding=SAME, relu=True)
    check(net, net.conv_layer(y, "b", 64, padding=SAME, residual=y), threads=2)


# Found by fuzzing and review.


def test_what_lies_beyond_the_last_channel_is_not_multiplied():
    """Division leaves NaN and infinity in the channels that fill up a quad."""
    net = Net(x=(1, 5))
    a, b = net.linear(net.inputs["x"], "a", 6), net.linear(net.inputs["x"], "b", 6)
    check_float(net, net.linear(net.emit(relax.op.divide(a, b)), "c", 5), rtol=1e-4)


def test_a_weight_of_the_model_may_be_called_as_one_of_a_kernels():
    net = Net(x=(7, 8))
    y = net.emit(relax.op.nn.relu(net.linear(net.inputs["x"], "a", 8)))
    y = net.emit(relax.op.multiply(y, net.floats("a.blocks", 8)))
    y = net.emit(relax.op.add(y, net.floats("a.bias_packed", 8)))
    check_float(net, y)


def test_tokens_and_a_map_one_pixel_high_lie_apart():
    """Both are planes of 1 x 3, and only the map needs padding."""
    net = Net(x=(1, 4, 1, 3))
    weight = net.floats("a.weight", 4, 4, 1, 3, scale=0.3)
    y = net.emit(relax.op.nn.relu(net.emit(relax.op.nn.conv2d(net.inputs["x"], weight, padding=(0, 1, 0, 1)))))
    y = net.emit(relax.op.permute_dims(y, [3, 1, 0, 2]))  # a batch of three pixels
    check_float(net, net.conv(net.conv(y, "b", 4, padding=1), "c", 4, padding=1))


def test_a_sum_after_a_layer_that_cannot_be_int8_is_made_once():
    """The chain falls back to its operators, of which the sum takes the activation along."""
    net = QuantizedNet(1, 4, 8, 8)
    x = net.start()
    stored = net.parameter("a.weight", net.rng.integers(-100, 100, (4, 4, 3, 3)).astype(np.int8))
    scale = net.parameter("a.weight.scale", np.full(4, 0.01, np.float32))
    zeros = relax.const(np.full(4, 3, np.int8), "int8")
    weight = net.emit(relax.op.dequantize(stored, scale, zeros, axis=0, out_dtype="float32"))
    y = net.emit(relax.op.nn.conv2d(x.var, weight, padding=SAME))
    y = net.rounded(y, x.q, 0.1, 128).var
    other = net.conv_layer(x, "b", 4, padding=SAME)
    y = net.emit(relax.op.nn.relu(net.emit(relax.op.add(y, other.var))))
    near_tvm(net, 0.1, net.rounded(y, x.q, 0.1, 0).var)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_not_lost_on_the_way(value):
    net = Net(x=(1, 8))
    hidden = net.emit(relax.op.nn.relu(net.linear(net.inputs["x"], "a", 8)))
    hidden = net.emit(relax.op.clip(net.linear(hidden, "b", 8), -1, 1))
    feed = np.full((1, 8), value, np.float32)
    feed[0, 1] = -value
    outputs, _ = run_lowered(net.module(net.emit(relax.op.nn.softmax(hidden))), {"x": feed})
    assert np.isnan(outputs[0]).all()
