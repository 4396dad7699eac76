import numpy as np
import tvm
from running import run_module
from scripted import assert_rewrites, assert_same_numbers, bindings, scripted
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.module import weights_of
from pumice.passes import FoldConstants


@I.ir_module
class Linear:
    @R.function
    def main(
        x: R.Tensor((2, 3), "float32"), fc__weight: R.Tensor((4, 3), "float32"), fc__bias: R.Tensor((1, 4), "float64")
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = R.permute_dims(fc__weight)
            h = R.matmul(x, w)
            b = R.reshape(fc__bias, (4,))
            c = R.astype(b, "float32")
            y = R.add(h, c)
            R.output(y)
        return y


@I.ir_module
class LinearFolded:
    @R.function
    def main(
        x: R.Tensor((2, 3), "float32"), fc__weight: R.Tensor((3, 4), "float32"), fc__bias: R.Tensor((4,), "float32")
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            h = R.matmul(x, fc__weight)
            y = R.add(h, fc__bias)
            R.output(y)
        return y


def test_moves_and_casts_keep_the_name():
    before = scripted(Linear)
    after = assert_rewrites(before, LinearFolded, FoldConstants())
    assert list(weights_of(after)) == ["fc.weight", "fc.bias"]
    np.testing.assert_array_equal(weights_of(after)["fc.weight"], weights_of(before)["fc.weight"].T)
    assert_same_numbers(before, after)


def test_a_weight_read_in_two_forms_becomes_two():
    @I.ir_module
    class Tied:
        @R.function
        def main(ids: R.Tensor((3,), "int64"), table: R.Tensor((9, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                e = R.take(table, ids, axis=0)
                w = R.permute_dims(table)
                v = R.permute_dims(table)
                y = R.matmul(e, w)
                z = R.matmul(e, v)
                s = R.add(y, z)
                R.output(s)
            return s

    before = scripted(Tied)
    after = FoldConstants()(before)
    assert {name: value.shape for name, value in weights_of(after).items()} == {"table": (9, 4), "table#2": (4, 9)}
    assert bindings(after) == ["take", "matmul", "matmul", "add"]
    again = FoldConstants()(after)
    assert list(weights_of(again)) == ["table", "table#2"]


def test_several_weights_take_the_name_of_the_largest():
    @I.ir_module
    class WeightNorm:
        @R.function
        def main(x: R.Tensor((2, 3), "float32"), g: R.Tensor((1, 4), "float32"), v: R.Tensor((3, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                q = R.multiply(v, v)
                s = R.sum(q, axis=[0], keepdims=True)
                n = R.sqrt(s)
                u = R.divide(v, n)
                w = R.multiply(g, u)
                y = R.matmul(x, w)
                R.output(y)
            return y

    before = scripted(WeightNorm)
    after = FoldConstants()(before)
    g, v = weights_of(before)["g"], weights_of(before)["v"]
    assert list(weights_of(after)) == ["v"]
    np.testing.assert_allclose(weights_of(after)["v"], g * v / np.sqrt((v * v).sum(0)), rtol=1e-6)
    assert_same_numbers(before, after)


def test_the_quantized_form_of_a_weight_stays_and_other_dequantizes_fold():
    @I.ir_module
    class Quantized:
        @R.function
        def main(
            x: R.Tensor((2, 3), "float32"),
            w: R.Tensor((4, 3), "int8"),
            scale: R.Tensor((4,), "float32"),
            b: R.Tensor((4,), "int32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                f = R.dequantize(w, scale, R.const(0, "int8"), axis=0)
                t = R.permute_dims(f)
                h = R.matmul(x, t)
                c = R.dequantize(b, R.const(0.5, "float32"), R.const(0, "int8"))
                y = R.add(h, c)
                R.output(y)
            return y

    before = scripted(Quantized)
    after = FoldConstants()(before)
    assert bindings(after) == ["dequantize", "permute_dims", "matmul", "add"]
    assert weights_of(after)["w"].dtype == np.int8
    np.testing.assert_array_equal(weights_of(after)["b"], weights_of(before)["b"] * np.float32(0.5))


def test_what_would_blow_up_the_model_stays():
    @I.ir_module
    class Broadcast:
        @R.function
        def main(x: R.Tensor((64, 64, 64), "float32"), w: R.Tensor((64,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                b = R.broadcast_to(w, (64, 64, 64))
                y = R.add(x, b)
                R.output(y)
            return y

    assert_rewrites(scripted(Broadcast), Broadcast, FoldConstants())


def test_an_operator_without_a_meaning_at_compile_time_stays():
    @I.ir_module
    class Unknown:
        @R.function
        def main(x: R.Tensor((4,), "float32"), w: R.Tensor((4,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                s = R.cumsum(w, axis=0)
                y = R.add(x, s)
                R.output(y)
            return y

    assert_rewrites(scripted(Unknown), Unknown, FoldConstants())


def test_an_output_that_is_a_weight():
    @I.ir_module
    class Weight:
        @R.function
        def main(x: R.Tensor((4,), "float32"), w: R.Tensor((2, 2), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.reshape(w, (4,))
                R.output(y)
            return y

    before = scripted(Weight)
    assert_same_numbers(before, FoldConstants()(before))


W = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
CASES = {
    "permute_dims": lambda w: relax.op.permute_dims(w, [1, 0]),
    "reshape": lambda w: relax.op.reshape(w, (2, -1)),
    "expand_dims": lambda w: relax.op.expand_dims(w, [0, -1]),
    "squeeze": lambda w: relax.op.squeeze(relax.op.expand_dims(w, [0, 2])),
    "concat": lambda w: relax.op.concat([w, w], axis=1),
    "stack": lambda w: relax.op.stack([w, w], axis=1),
    "split": lambda w: relax.TupleGetItem(relax.op.split(w, 2, axis=0), 1),
    "split_at": lambda w: relax.TupleGetItem(relax.op.split(w, [1, 3], axis=-1), 1),
    "slice": lambda w: relax.op.strided_slice(w, [0, 1], [0, 3], [3, 0], [2, -1]),
    "slice_backwards": lambda w: relax.op.strided_slice(w, [1], [-1], [-99], [-1]),
    "take": lambda w: relax.op.take(w, relax.const(np.array([2, 0]), "int64"), axis=0),
    "add": lambda w: relax.op.add(w, relax.const(0.1)),
    "subtract": lambda w: relax.op.subtract(relax.const(0.1), w),
    "divide": lambda w: relax.op.divide(w, relax.const(3.0)),
    "power": lambda w: relax.op.power(w, relax.const(2.0)),
    "sqrt": relax.op.sqrt,
    "rsqrt": relax.op.rsqrt,
    "exp": relax.op.exp,
    "negative": relax.op.negative,
    "maximum": lambda w: relax.op.maximum(w, relax.const(5.0)),
    "minimum": lambda w: relax.op.minimum(w, relax.const(5.0)),
    "clip": lambda w: relax.op.clip(w, 2, 7),
    "astype": lambda w: relax.op.astype(relax.op.multiply(w, relax.const(-0.3)), "int32"),
    "where": lambda w: relax.op.where(relax.op.greater(w, relax.const(4.0)), w, relax.const(0.0)),
    "full": lambda w: relax.op.add(w, relax.op.full((4,), relax.const(2.0))),
    "arange": lambda w: relax.op.add(w, relax.op.astype(relax.op.arange(4), "float32")),
    "sum": lambda w: relax.op.sum(w, axis=[1], keepdims=True),
    "mean": lambda w: relax.op.mean(w, axis=0),
    "max": lambda w: relax.op.max(w),
    "variance": lambda w: relax.op.variance(w, axis=[-1]),
    "tanh": relax.op.tanh,
    "sigmoid": relax.op.sigmoid,
}


def test_folding_equals_running():
    """Each operator's meaning at compile time is what TVM computes at run time."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1,), "float32"))
    w = relax.Var("w", relax.TensorType(W.shape, "float32"))
    with builder.function("main", [x, w], attrs={"num_input": 1}):
        with builder.dataflow():
            values = [builder.emit(case(w)) for case in CASES.values()]
            results = [builder.emit(relax.op.add(relax.op.astype(value, "float32"), x)) for value in values]
            result = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(result)
    before = scripted(builder.get(), w=W)
    after = FoldConstants()(before)
    assert set(bindings(after)) == {"add", "Tuple"}
    inputs = {"x": np.zeros(1, np.float32)}
    for name, expected, folded in zip(CASES, run_module(before, inputs), run_module(after, inputs), strict=True):
        np.testing.assert_allclose(folded, expected, rtol=1e-6, err_msg=name)


def test_works_without_weights_in_a_foreign_module():
    @I.ir_module
    class Foreign:
        @R.function
        def main(x: R.Tensor((2, 2), "float32")):
            with R.dataflow():
                a = R.add(R.const(1.0, "float32"), R.const(2.0, "float32"))
                y = R.multiply(x, a)
                R.output(y)
            return y

    after = FoldConstants()(Foreign)
    assert bindings(after) == ["multiply"]
    assert len(after["main"].params) == 1
    tvm.relax.analysis.well_formed(after)
