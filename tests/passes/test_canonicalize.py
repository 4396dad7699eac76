"""CanonicalizeActivations, CanonicalizeBias, CanonicalizeConv, CanonicalizeLinear, RemoveIdentities and the sink."""

import numpy as np
import pytest
from scripted import assert_rewrites, assert_same_numbers, bindings, scripted
from tvm import relax, topi
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from pumice.module import weights_of
from pumice.passes import (
    CanonicalizeActivations,
    CanonicalizeBias,
    CanonicalizeConv,
    CanonicalizeLinear,
    FoldConstants,
    RemoveIdentities,
    SinkBelowDequantize,
)


def unary(operation, shape=(2, 6)):
    """A module of one input and what ``operation(builder, x)`` makes of it."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            result = builder.emit_output(operation(builder, x))
        builder.emit_func_output(result)
    return builder.get()


def f32(value):
    return T.float32(value)


ACTIVATIONS = {
    "maximum with 0": (lambda b, x: relax.op.maximum(x, relax.const(0.0)), relax.op.nn.relu),
    "0 on the left": (lambda b, x: relax.op.maximum(relax.const(0.0), x), relax.op.nn.relu),
    "relu6": (lambda b, x: relax.op.nn.relu6(x), lambda x: relax.op.clip(x, f32(0.0), f32(6.0))),
    "min of max": (
        lambda b, x: relax.op.minimum(b.emit(relax.op.maximum(x, relax.const(-1.0))), relax.const(2.0)),
        lambda x: relax.op.clip(x, f32(-1.0), f32(2.0)),
    ),
    "max of min": (
        lambda b, x: relax.op.maximum(b.emit(relax.op.minimum(x, relax.const(6.0))), relax.const(0.0)),
        lambda x: relax.op.clip(x, f32(0.0), f32(6.0)),
    ),
    "one-sided clips": (
        lambda b, x: relax.op.clip(b.emit(relax.op.clip(x, 0, np.inf)), -np.inf, 6),
        lambda x: relax.op.clip(x, f32(0.0), f32(6.0)),
    ),
    "clip at 0": (lambda b, x: relax.op.clip(x, 0, np.inf), relax.op.nn.relu),
    "integers as bounds": (lambda b, x: relax.op.clip(x, 0, 6), lambda x: relax.op.clip(x, f32(0.0), f32(6.0))),
    "clip of relu": (
        lambda b, x: relax.op.clip(b.emit(relax.op.nn.relu(x)), f32(-3.0), f32(3.0)),
        lambda x: relax.op.clip(x, f32(0.0), f32(3.0)),
    ),
    "disjoint ranges": (
        lambda b, x: relax.op.clip(b.emit(relax.op.clip(x, f32(0.0), f32(1.0))), f32(2.0), f32(3.0)),
        lambda x: relax.op.clip(x, f32(2.0), f32(2.0)),
    ),
    "relu of relu": (lambda b, x: relax.op.nn.relu(b.emit(relax.op.nn.relu(x))), relax.op.nn.relu),
    "one slope below zero": (
        lambda b, x: relax.op.maximum(x, b.emit(relax.op.multiply(relax.const(0.25), x))),
        lambda x: relax.op.nn.leakyrelu(x, 0.25),
    ),
    "the same slope for all channels": (
        lambda b, x: relax.op.nn.prelu(x, relax.const(np.full(6, 0.25, np.float32)), -1),
        lambda x: relax.op.nn.leakyrelu(x, 0.25),
    ),
    "leaks above zero": (
        lambda b, x: relax.op.maximum(x, b.emit(relax.op.multiply(relax.const(1.25), x))),
        lambda x: relax.op.maximum(x, relax.op.multiply(relax.const(1.25), x)),
    ),
    "TOPI's functions": (
        lambda b, x: b.emit_te(topi.minimum, b.emit_te(topi.maximum, x, relax.const(0.0)), relax.const(6.0)),
        lambda x: relax.op.clip(x, f32(0.0), f32(6.0)),
    ),
    "one bound": (
        lambda b, x: relax.op.minimum(x, relax.const(6.0)),
        lambda x: relax.op.minimum(x, relax.const(6.0)),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    spelled_out, canonical = ACTIVATIONS[name]
    before = scripted(unary(spelled_out))
    expected = unary(lambda b, x: canonical(x))
    assert_rewrites(before, expected, CanonicalizeActivations())
    if name in ("disjoint ranges", "TOPI's functions"):
        assert_same_numbers(before, CanonicalizeActivations()(before))


def test_a_function_that_is_only_called_maximum_is_left_alone():
    @I.ir_module
    class Impostor:
        @T.prim_func(s_tir=True)
        def maximum(a: T.Buffer((4,), "float32"), b: T.Buffer((), "float32"), y: T.Buffer((4,), "float32")):
            for i in range(4):
                with T.sblock("maximum"):
                    v = T.axis.spatial(4, i)
                    y[v] = a[v] + b[()]

        @R.function
        def main(x: R.Tensor((4,), "float32")):
            cls = Impostor
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.call_tir(cls.maximum, (x, R.const(0.0, "float32")), out_ty=R.Tensor((4,), "float32"))
                R.output(y)
            return y

    assert bindings(CanonicalizeActivations()(scripted(Impostor))) == ["call_tir"]


IDENTITIES = {
    "reshape": lambda b, x: relax.op.reshape(x, (2, 6)),
    "reshape there and back": lambda b, x: relax.op.reshape(b.emit(relax.op.reshape(x, (3, 4))), (2, 6)),
    "cast": lambda b, x: relax.op.astype(x, "float32"),
    "permute": lambda b, x: relax.op.permute_dims(x, [0, 1]),
    "permute twice": lambda b, x: relax.op.permute_dims(b.emit(relax.op.permute_dims(x)), [1, 0]),
    "expand, squeeze": lambda b, x: relax.op.squeeze(b.emit(relax.op.expand_dims(x, [1])), [1]),
    "broadcast": lambda b, x: relax.op.broadcast_to(x, (2, 6)),
    "concat of one": lambda b, x: relax.op.concat([x], 0),
    "times one": lambda b, x: relax.op.multiply(relax.const(1.0), x),
    "over one": lambda b, x: relax.op.divide(x, relax.const(1.0)),
    "plus zero": lambda b, x: relax.op.add(x, relax.const(0.0)),
    "minus zero": lambda b, x: relax.op.subtract(x, relax.const(0.0)),
    "dropout": lambda b, x: relax.TupleGetItem(b.emit(relax.op.nn.dropout(x, 0.5)), 0),
    "no padding": lambda b, x: relax.op.nn.pad(x, [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name):
    def then_relu(operation):
        return lambda b, x: relax.op.nn.relu(b.emit(operation(b, x)))

    before = scripted(unary(then_relu(IDENTITIES[name])))
    assert_rewrites(before, unary(lambda b, x: relax.op.nn.relu(x)), RemoveIdentities())


def test_what_looks_like_an_identity_but_broadcasts_stays():
    grows = unary(lambda b, x: relax.op.multiply(x, relax.const(np.ones((3, 2, 6), "float32"))))
    assert bindings(RemoveIdentities()(scripted(grows))) == ["multiply"]


def test_a_model_that_is_an_identity():
    before = scripted(unary(lambda b, x: relax.op.reshape(x, (2, 6))))
    assert_same_numbers(before, RemoveIdentities()(before))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4), (1,)])
@pytest.mark.parametrize("left", [True, False])
def test_linear_bias(shape, left):
    builder = relax.BlockBuilder()
    x, w, b = (relax.Var(n, relax.TensorType(s, "float32")) for n, s in [("x", (2, 5, 3)), ("w", (3, 4)), ("b", shape)])
    with builder.function("main", [x, w, b], attrs={"num_input": 1}):
        with builder.dataflow():
            h = builder.emit(relax.op.matmul(x, w))
            y = builder.emit_output(relax.op.add(*((b, h) if left else (h, b))))
        builder.emit_func_output(y)
    before = scripted(builder.get())
    after = CanonicalizeBias()(before)
    assert weights_of(after)["b"].shape == (4,)
    add = after["main"].body.blocks[0].bindings[-1].value
    assert add.args[1].name == "b"
    np.testing.assert_array_equal(weights_of(after)["b"], np.broadcast_to(weights_of(before)["b"].ravel(), 4))


def test_conv_bias_and_what_is_none():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 3, 4, 4), "float32"),
            conv__weight: R.Tensor((4, 3, 1, 1), "float32"),
            b: R.Tensor((4, 1, 1), "float32"),
            position: R.Tensor((1, 4, 4, 4), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.nn.conv2d(x, conv__weight)
                a = R.subtract(h, b)
                k = R.nn.conv2d(x, conv__weight)
                c = R.add(position, k)
                y = R.add(a, c)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 3, 4, 4), "float32"),
            conv__weight: R.Tensor((4, 3, 1, 1), "float32"),
            b: R.Tensor((1, 4, 1, 1), "float32"),
            position: R.Tensor((1, 4, 4, 4), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.nn.conv2d(x, conv__weight)
                a = R.add(h, b)
                k = R.nn.conv2d(x, conv__weight)
                c = R.add(position, k)
                y = R.add(a, c)
                R.output(y)
            return y

    before = scripted(Before)
    assert_same_numbers(before, assert_rewrites(before, Expected, CanonicalizeBias()))


def test_a_constant_bias_becomes_a_parameter():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3), "float32"), fc__weight: R.Tensor((3, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.matmul(x, fc__weight)
                y = R.add(h, R.const(2.0, "float32"))
                R.output(y)
            return y

    after = CanonicalizeBias()(scripted(Before))
    np.testing.assert_array_equal(weights_of(after)["fc.bias"], np.full(4, 2, np.float32))


def test_linear_forms():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((2, 5, 3), "float32"),
            a__weight: R.Tensor((4, 3), "float32"),
            b__weight: R.Tensor((1, 4, 6), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                wide = R.broadcast_to(x, (2, 5, 3))
                a = R.permute_dims(a__weight)
                spread = R.broadcast_to(a, (2, 3, 4))
                h = R.matmul(wide, spread)
                s = R.multiply(h, R.const(0.5, "float32"))
                y = R.matmul(s, b__weight)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((2, 5, 3), "float32"),
            a__weight: R.Tensor((3, 4), "float32"),
            b__weight: R.Tensor((4, 6), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.matmul(x, a__weight)
                y = R.matmul(h, b__weight)
                R.output(y)
            return y

    before = scripted(Before)
    after = assert_rewrites(RemoveIdentities()(FoldConstants()(before)), Expected, CanonicalizeLinear())
    assert_same_numbers(before, after)


def test_a_product_of_two_activations_is_no_linear_layer():
    @I.ir_module
    class Attention:
        @R.function
        def main(q: R.Tensor((2, 5, 3), "float32"), k: R.Tensor((2, 3, 5), "float32")):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                s = R.multiply(q, R.const(0.5, "float32"))
                y = R.matmul(s, k)
                R.output(y)
            return y

    assert_rewrites(scripted(Attention), Attention, CanonicalizeLinear())


def test_moves_sink_below_dequantize():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3), "float32"), w: R.Tensor((4, 3), "int8"), scale: R.Tensor((4,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                f = R.dequantize(w, scale, R.const(0, "int8"), axis=0)
                t = R.permute_dims(f)
                y = R.matmul(x, t)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 3), "float32"), w: R.Tensor((3, 4), "int8"), scale: R.Tensor((4,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                t = R.dequantize(w, scale, R.const(0, "int8"), axis=1)
                y = R.matmul(x, t)
                R.output(y)
            return y

    before = scripted(Before)
    assert_same_numbers(before, assert_rewrites(before, Expected, SinkBelowDequantize()))


def test_padding_moves_into_the_convolution():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 3, 4, 4), "float32"), w: R.Tensor((4, 3, 3, 3), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                p = R.nn.pad(x, (0, 0, 0, 0, 0, 1, 2, 3))
                y = R.nn.conv2d(p, w, padding=(1, 0, 0, 1), strides=2)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 3, 4, 4), "float32"), w: R.Tensor((4, 3, 3, 3), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.nn.conv2d(x, w, padding=(1, 2, 1, 4), strides=2)
                R.output(y)
            return y

    before = scripted(Before)
    assert_same_numbers(before, assert_rewrites(before, Expected, CanonicalizeConv()))


@pytest.mark.parametrize("pad", [{"pad_value": 1.0}, {"pad_mode": "reflect"}])
def test_other_padding_stays(pad):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 4, 4), "float32"))
    w = relax.Var("w", relax.TensorType((4, 3, 3, 3), "float32"))
    with builder.function("main", [x, w], attrs={"num_input": 1}):
        with builder.dataflow():
            padded = builder.emit(relax.op.nn.pad(x, (0, 0, 0, 0, 1, 1, 1, 1), **pad))
            y = builder.emit_output(relax.op.nn.conv2d(padded, w))
        builder.emit_func_output(y)
    assert bindings(CanonicalizeConv()(scripted(builder.get()))) == ["nn.pad", "nn.conv2d"]


def test_a_chain_of_conv1d_becomes_a_chain_of_conv2d():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 3, 9), "float32"),
            a__weight: R.Tensor((4, 3, 3), "float32"),
            a__bias: R.Tensor((1, 4, 1), "float32"),
            b__weight: R.Tensor((4, 2, 3), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                p = R.nn.pad(x, (0, 0, 0, 0, 2, 0))
                h = R.nn.conv1d(p, a__weight, strides=2, padding=1)
                i = R.add(h, a__bias)
                j = R.nn.relu(i)
                k = R.nn.conv1d(j, b__weight, dilation=2, groups=2, padding=2)
                y = R.add(k, i)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 3, 9), "float32"),
            a__weight: R.Tensor((4, 3, 1, 3), "float32"),
            a__bias: R.Tensor((1, 4, 1, 1), "float32"),
            b__weight: R.Tensor((4, 2, 1, 3), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                e = R.expand_dims(x, axis=[2])
                h = R.nn.conv2d(e, a__weight, strides=(1, 2), padding=(0, 3, 0, 1))
                i = R.add(h, a__bias)
                j = R.nn.relu(i)
                k = R.nn.conv2d(j, b__weight, dilation=(1, 2), groups=2, padding=(0, 2, 0, 2))
                r = R.add(k, i)
                y = R.squeeze(r, axis=[2])
                R.output(y)
            return y

    before = scripted(Before)
    after = FoldConstants()(RemoveIdentities()(CanonicalizeConv()(before)))
    assert_rewrites(after, Expected, CanonicalizeConv())
    assert_same_numbers(before, after)
