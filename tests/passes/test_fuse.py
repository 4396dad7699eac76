"""FuseGelu, FuseLayerNorm and FuseRMSNorm on the ways in which exporters spell these out."""

import math

import pytest
from scripted import assert_same_numbers, bindings, scripted
from tvm import relax
from tvm.relax import op
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.passes import FuseGelu, FuseLayerNorm, FuseRMSNorm


def module(build, shape=(2, 5, 8), vectors=0):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    weights = [relax.Var(f"w{i}", relax.TensorType(shape[-1:], "float32")) for i in range(vectors)]
    with builder.function("main", [x, *weights], attrs={"num_input": 1}):
        with builder.dataflow():
            result = builder.emit_output(build(lambda e: builder.emit(e), x, *weights))
        builder.emit_func_output(result)
    return scripted(builder.get())


def c(value):
    return relax.const(value, "float32")


def erf_first_product(e, x):
    f = e(op.add(e(op.erf(e(op.divide(x, c(math.sqrt(2)))))), c(1.0)))
    return op.multiply(e(op.multiply(x, f)), c(0.5))


def erf_half_first(e, x):
    f = e(op.add(c(1.0), e(op.erf(e(op.multiply(x, c(math.sqrt(0.5))))))))
    return op.multiply(e(op.multiply(c(0.5), x)), f)


def erf_half_with_bracket(e, x):
    f = e(op.add(e(op.erf(e(op.multiply(c(0.70710678), x)))), c(1.0)))
    return op.multiply(x, e(op.multiply(f, c(0.5))))


def erf_of_a_sum(e, x):
    z = e(op.add(x, e(op.multiply(x, c(3.0)))))
    return erf_first_product(e, z)


def tanh_with_power(e, x):
    inner = e(op.add(x, e(op.multiply(c(0.044715), e(op.power(x, c(3.0)))))))
    f = e(op.add(c(1.0), e(op.tanh(e(op.multiply(inner, c(math.sqrt(2 / math.pi))))))))
    return op.multiply(e(op.multiply(c(0.5), x)), f)


def tanh_with_products(e, x):
    cube = e(op.multiply(x, e(op.multiply(x, x))))
    inner = e(op.add(e(op.multiply(c(0.7978846), x)), e(op.multiply(c(0.0356774), cube))))
    f = e(op.add(e(op.tanh(inner)), c(1.0)))
    return op.multiply(c(0.5), e(op.multiply(x, f)))


@pytest.mark.parametrize("form", [erf_first_product, erf_half_first, erf_half_with_bracket, erf_of_a_sum])
def test_gelu(form):
    before = module(form)
    after = FuseGelu()(before)
    assert bindings(after)[-1] == "nn.gelu"
    assert "erf" not in bindings(after)
    if form is erf_of_a_sum:
        assert_same_numbers(before, after)


@pytest.mark.parametrize("form", [tanh_with_power, tanh_with_products])
def test_gelu_tanh(form):
    before = module(form)
    after = FuseGelu()(before)
    assert bindings(after) == ["nn.gelu_tanh"]
    if form is tanh_with_products:
        assert_same_numbers(before, after)


def test_nearly_gelu_is_left_alone():
    def other_constant(e, x):
        f = e(op.add(e(op.erf(e(op.multiply(x, c(0.7))))), c(1.0)))
        return op.multiply(e(op.multiply(x, f)), c(0.5))

    def other_factor(e, x):
        f = e(op.add(e(op.erf(e(op.divide(x, c(math.sqrt(2)))))), c(1.0)))
        return op.multiply(e(op.multiply(e(op.nn.relu(x)), f)), c(0.5))

    for form in (other_constant, other_factor):
        assert "erf" in bindings(FuseGelu()(module(form)))


def layer_norm(square, root):
    def build(e, x, gamma, beta):
        d = e(op.subtract(x, e(op.mean(x, [-1], keepdims=True))))
        s = e(op.power(d, c(2.0))) if square == "power" else e(op.multiply(d, d))
        v = e(op.add(e(op.mean(s, [2], keepdims=True)), c(1e-3)))
        n = e(op.divide(d, e(op.sqrt(v)))) if root == "sqrt" else e(op.multiply(e(op.rsqrt(v)), d))
        return op.add(beta, e(op.multiply(n, gamma)))

    return build


@pytest.mark.parametrize("square", ["power", "multiply"])
@pytest.mark.parametrize("root", ["sqrt", "rsqrt"])
def test_layer_norm(square, root):
    before = module(layer_norm(square, root), vectors=2)
    after = FuseLayerNorm()(before)
    assert bindings(after) == ["nn.layer_norm"]
    attrs = after["main"].body.blocks[0].bindings[0].value.attrs
    assert math.isclose(attrs.epsilon, 1e-3, rel_tol=1e-6)
    if (square, root) == ("power", "sqrt"):
        assert_same_numbers(before, after)


def test_layer_norm_over_another_axis_or_of_another_mean_is_left_alone():
    def over_axis_1(e, x, gamma, beta):
        d = e(op.subtract(x, e(op.mean(x, [1], keepdims=True))))
        v = e(op.add(e(op.mean(e(op.power(d, c(2.0))), [1], keepdims=True)), c(1e-5)))
        return op.add(e(op.multiply(e(op.divide(d, e(op.sqrt(v)))), gamma)), beta)

    def of_another(e, x, gamma, beta):
        d = e(op.subtract(x, e(op.mean(e(op.nn.relu(x)), [-1], keepdims=True))))
        v = e(op.add(e(op.mean(e(op.power(d, c(2.0))), [-1], keepdims=True)), c(1e-5)))
        return op.add(e(op.multiply(e(op.divide(d, e(op.sqrt(v)))), gamma)), beta)

    for build in (over_axis_1, of_another):
        assert "nn.layer_norm" not in bindings(FuseLayerNorm()(module(build, vectors=2)))


def test_rms_norm():
    def build(e, x, gamma):
        v = e(op.add(e(op.mean(e(op.power(x, c(2.0))), [-1], keepdims=True)), c(1e-6)))
        return op.multiply(gamma, e(op.multiply(x, e(op.rsqrt(v)))))

    before = module(build, vectors=1)
    after = FuseRMSNorm()(before)
    assert bindings(after) == ["nn.rms_norm"]
    assert_same_numbers(before, after)


def test_rms_norm_without_a_weight_is_left_alone():
    @I.ir_module
    class Plain:
        @R.function
        def main(x: R.Tensor((2, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                q = R.power(x, R.const(2.0, "float32"))
                m = R.mean(q, axis=[-1], keepdims=True)
                v = R.add(m, R.const(1e-6, "float32"))
                r = R.rsqrt(v)
                y = R.multiply(x, r)
                R.output(y)
            return y

    assert bindings(FuseRMSNorm()(scripted(Plain)))[-1] == "multiply"
