import numpy as np
import pytest
from scripted import assert_rewrites, assert_same_numbers, bindings, scripted
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.errors import ModelError
from pumice.module import weights_of
from pumice.passes import CanonicalizeBias, FoldBatchNorm

VARIANCE = np.array([0.5, 1.0, 2.0, 4.0])


@I.ir_module
class ConvBatchNorm:
    @R.function
    def main(
        x: R.Tensor((1, 4, 5, 5), "float32"),
        conv__weight: R.Tensor((4, 2, 3, 3), "float32"),
        bn__weight: R.Tensor((4,), "float32"),
        bn__bias: R.Tensor((4,), "float32"),
        bn__running_mean: R.Tensor((4,), "float32"),
        bn__running_var: R.Tensor((4,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            h = R.nn.conv2d(x, conv__weight, padding=1, groups=2)
            n = R.nn.batch_norm(
                h, bn__weight, bn__bias, bn__running_mean, bn__running_var, axis=1, epsilon=0.25, training=False
            )
            y = n[0]
            R.output(y)
        return y


@I.ir_module
class ConvFolded:
    @R.function
    def main(
        x: R.Tensor((1, 4, 5, 5), "float32"),
        conv__weight: R.Tensor((4, 2, 3, 3), "float32"),
        conv__bias: R.Tensor((1, 4, 1, 1), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            h = R.nn.conv2d(x, conv__weight, padding=1, groups=2)
            y = R.add(h, conv__bias)
            R.output(y)
        return y


def test_batch_norm_after_a_convolution():
    before = scripted(ConvBatchNorm, bn__running_var=VARIANCE)
    after = assert_rewrites(before, ConvFolded, FoldBatchNorm())
    old, new = weights_of(before), weights_of(after)
    assert list(new) == ["conv.weight", "conv.bias"]
    scale = old["bn.weight"] / np.sqrt(VARIANCE + 0.25)
    np.testing.assert_allclose(new["conv.weight"], old["conv.weight"] * scale[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(new["conv.bias"].ravel(), old["bn.bias"] - old["bn.running_mean"] * scale, rtol=1e-5)
    assert_same_numbers(before, after)


def test_zero_weights_stay_zero_and_a_pruned_gamma_makes_zeros():
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((4, 2, 3, 3)) * (generator.random((4, 2, 3, 3)) < 0.3)
    before = scripted(ConvBatchNorm, conv__weight=weight, bn__weight=[1.5, 0, -2, 1e-30], bn__running_var=VARIANCE)
    after = weights_of(FoldBatchNorm()(before))["conv.weight"]
    assert (after[weight == 0] == 0).all()
    assert (after[1] == 0).all()


@pytest.mark.parametrize("variance", [[1, -2, 1, 1], [1, np.nan, 1, 1]])
def test_impossible_statistics_are_refused(variance):
    with pytest.raises(ModelError, match=r"scripted: the batch norm that computes .* is not finite in channel 1"):
        FoldBatchNorm()(scripted(ConvBatchNorm, bn__running_var=variance))


def test_batch_norm_after_a_linear_layer_with_bias():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((2, 3), "float32"),
            fc__weight: R.Tensor((3, 4), "float32"),
            fc__bias: R.Tensor((4,), "float32"),
            g: R.Tensor((4,), "float32"),
            b: R.Tensor((4,), "float32"),
            m: R.Tensor((4,), "float32"),
            v: R.Tensor((4,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.matmul(x, fc__weight)
                a = R.add(fc__bias, h)
                n = R.nn.batch_norm(a, g, b, m, v, axis=1, training=False)
                y = n[0]
                R.output(y)
            return y

    before = scripted(Before, v=VARIANCE)
    after = FoldBatchNorm()(CanonicalizeBias()(before))
    assert bindings(after) == ["matmul", "add"]
    assert list(weights_of(after)) == ["fc.weight", "fc.bias"]
    assert_same_numbers(before, after)


def test_the_decomposed_form_folds_step_by_step():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 3, 4, 4), "float32"),
            conv__weight: R.Tensor((4, 3, 1, 1), "float32"),
            mean: R.Tensor((1, 4, 1, 1), "float32"),
            root: R.Tensor((4, 1, 1), "float32"),
            gamma: R.Tensor((1, 4, 1, 1), "float32"),
            beta: R.Tensor((4, 1, 1), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.nn.conv2d(x, conv__weight)
                a = R.subtract(h, mean)
                b = R.divide(a, root)
                c = R.multiply(gamma, b)
                y = R.add(c, beta)
                R.output(y)
            return y

    before = scripted(Before, root=VARIANCE)
    after = FoldBatchNorm()(CanonicalizeBias()(before))
    assert bindings(after) == ["nn.conv2d", "add"]
    assert_same_numbers(before, after)


def test_before_a_padded_convolution_it_becomes_multiply_and_add():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 4, 4, 4), "float32"),
            bn__weight: R.Tensor((4,), "float32"),
            bn__bias: R.Tensor((4,), "float32"),
            m: R.Tensor((4,), "float32"),
            v: R.Tensor((4,), "float32"),
            conv__weight: R.Tensor((2, 4, 3, 3), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                n = R.nn.batch_norm(x, bn__weight, bn__bias, m, v, axis=1, training=False)
                a = n[0]
                y = R.nn.conv2d(a, conv__weight, padding=1)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 4, 4, 4), "float32"),
            bn__weight: R.Tensor((1, 4, 1, 1), "float32"),
            bn__bias: R.Tensor((1, 4, 1, 1), "float32"),
            conv__weight: R.Tensor((2, 4, 3, 3), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                s = R.multiply(x, bn__weight)
                a = R.add(s, bn__bias)
                y = R.nn.conv2d(a, conv__weight, padding=1)
                R.output(y)
            return y

    before = scripted(Before, v=VARIANCE)
    assert_same_numbers(before, assert_rewrites(before, Expected, FoldBatchNorm()))


def test_a_layer_that_is_read_elsewhere_keeps_its_weight():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 4, 4, 4), "float32"),
            conv__weight: R.Tensor((4, 4, 1, 1), "float32"),
            g: R.Tensor((4,), "float32"),
            b: R.Tensor((4,), "float32"),
            m: R.Tensor((4,), "float32"),
            v: R.Tensor((4,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.nn.conv2d(x, conv__weight)
                n = R.nn.batch_norm(h, g, b, m, v, axis=1, training=False)
                a = n[0]
                y = R.add(a, h)
                R.output(y)
            return y

    before = scripted(Before, v=VARIANCE)
    after = FoldBatchNorm()(before)
    assert bindings(after) == ["nn.conv2d", "multiply", "add", "add"]
    np.testing.assert_array_equal(weights_of(after)["conv.weight"], weights_of(before)["conv.weight"])
    assert_same_numbers(before, after)


def test_two_layers_that_share_a_weight_get_one_each():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 4, 4, 4), "float32"),
            conv__weight: R.Tensor((4, 4, 1, 1), "float32"),
            s: R.Tensor((4, 1, 1), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.nn.conv2d(x, conv__weight)
                a = R.multiply(h, s)
                k = R.nn.conv2d(x, conv__weight)
                y = R.subtract(a, k)
                R.output(y)
            return y

    before = scripted(Before)
    after = FoldBatchNorm()(before)
    assert list(weights_of(after)) == ["conv.weight", "conv.weight#2"]
    np.testing.assert_array_equal(weights_of(after)["conv.weight"], weights_of(before)["conv.weight"])
    assert_same_numbers(before, after)


def test_an_int8_weight_is_not_scaled():
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3), "float32"), w: R.Tensor((3, 4), "int8"), s: R.Tensor((4,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                f = R.dequantize(w, R.const(0.1, "float32"), R.const(0, "int8"))
                h = R.matmul(x, f)
                y = R.multiply(h, s)
                R.output(y)
            return y

    assert_rewrites(scripted(Before), Before, FoldBatchNorm())
