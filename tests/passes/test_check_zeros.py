import numpy as np
import pytest
import tvm
from scripted import scripted
from tvm import relax
from tvm.ir import IRModule
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.errors import ModelError
from pumice.module import weights_of, with_weights
from pumice.passes import FoldConstants, FoldMasks, NoPrunedWeightCameBack, Prune, SimplifyModel


@I.ir_module
class Network:
    @R.function
    def main(
        x: R.Tensor((1, 4, 6), "float32"),
        conv__weight_orig: R.Tensor((4, 4, 3), "float32"),
        conv__weight_mask: R.Tensor((4, 4, 3), "float32"),
        fc__weight: R.Tensor((6, 6), "float32"),
        fc__bias: R.Tensor((6,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            m = R.multiply(conv__weight_orig, conv__weight_mask)
            h = R.nn.conv1d(x, m, padding=1)
            w = R.permute_dims(fc__weight)
            a = R.matmul(h, w)
            y = R.add(a, fc__bias)
            R.output(y)
        return y


def network():
    generator = np.random.default_rng(0)
    mask = (generator.random((4, 4, 3)) < 0.5).astype(np.float32)
    fc = np.tril(generator.standard_normal((6, 6)))
    return scripted(Network, conv__weight_mask=mask, fc__weight=fc, fc__bias=np.zeros(6))


def changes(name, change):
    """A pass that changes one weight's value."""

    @tvm.transform.module_pass(opt_level=0, name="Change")
    class Change:
        def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
            weights = dict(weights_of(mod))
            weights[name] = change(weights[name])
            return with_weights(mod, weights)

    return Change()


def revive(value):
    value = value.copy()
    value[np.unravel_index(np.flatnonzero(value == 0)[0], value.shape)] = 1
    return value


def checked(mod, *passes):
    with tvm.transform.PassContext(instruments=[NoPrunedWeightCameBack()]):
        return tvm.transform.Sequential(list(passes))(mod)


def test_the_passes_of_the_project_pass():
    after = checked(network(), SimplifyModel(), Prune("magnitude:1x4:0.6"), SimplifyModel())
    assert not np.tril(weights_of(after)["fc.weight"], -1).any()


@pytest.mark.parametrize("simplified", [False, True])
def test_a_revived_weight_is_reported_with_pass_and_name(simplified):
    mod = SimplifyModel()(network()) if simplified else network()
    with pytest.raises(ModelError, match=r"scripted: the pass Change made 1 of \d+ zero weights of fc.weight nonzero"):
        checked(mod, changes("fc.weight", revive))


def test_a_transposed_square_weight_is_seen_through_but_a_wrong_transpose_is_not():
    assert weights_of(checked(network(), FoldConstants()))["fc.weight"][0, 5] != 0
    with pytest.raises(ModelError, match=r"fc.weight"):
        checked(SimplifyModel()(network()), changes("fc.weight", np.transpose))


def test_a_changed_mask_counts():
    with pytest.raises(ModelError, match=r"zero weights of conv.weight nonzero"):
        checked(FoldMasks()(network()), changes("conv.weight", lambda w: w + 1))


def test_more_zeros_other_values_and_biases_are_fine():
    checked(SimplifyModel()(network()), changes("fc.weight", lambda w: w * 2), changes("fc.bias", lambda b: b + 1))
    checked(SimplifyModel()(network()), changes("fc.weight", np.zeros_like))


def test_turning_int8_is_seen_through():
    @I.ir_module
    class Quantized:
        @R.function
        def main(x: R.Tensor((1, 4), "float32"), fc__weight: R.Tensor((4, 4), "int8"), s: R.Tensor((4,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                f = R.dequantize(fc__weight, s, R.const(0, "int8"), axis=1)
                y = R.matmul(x, f)
                R.output(y)
            return y

    @I.ir_module
    class Float:
        @R.function
        def main(x: R.Tensor((1, 4), "float32"), fc__weight: R.Tensor((4, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.matmul(x, fc__weight)
                R.output(y)
            return y

    def becomes(weight):
        @tvm.transform.module_pass(opt_level=0, name="ToInt8")
        class ToInt8:
            def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
                return scripted(Quantized, fc__weight=weight)

        return ToInt8()

    pruned = np.tril(np.ones((4, 4)))
    checked(scripted(Float, fc__weight=pruned), becomes(pruned * 9))
    with pytest.raises(ModelError, match=r"the pass ToInt8 made 6 of 6 zero weights of fc.weight nonzero"):
        checked(scripted(Float, fc__weight=pruned), becomes(pruned * 9 + 1))


def test_a_malformed_module_is_reported():
    @tvm.transform.module_pass(opt_level=0, name="Break")
    class Break:
        def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
            main = mod["main"]
            broken = mod.clone()
            function = relax.Function(main.params[:-1], main.body, main.ret_ty, main.is_pure, main.attrs)
            broken.update_func(broken.get_global_var("main"), function)
            return broken

    with pytest.raises(ModelError, match="scripted: the pass Break left a malformed module"):
        checked(network(), Break())


def test_lowering_and_building_go_through_it():
    mod = SimplifyModel()(network())
    with tvm.transform.PassContext(instruments=[NoPrunedWeightCameBack()]):
        relax.build(mod, tvm.target.Target("llvm"))


def test_a_product_of_activations_deep_in_a_network_is_no_weight():
    x = relax.Var("x", relax.TensorType((4, 4), "float32"))
    weight = relax.Var("w", relax.TensorType((4, 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, weight], {"num_input": 1}):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, weight))
            for _ in range(1500):  # deeper than Python recurses
                y = builder.emit(relax.op.nn.relu(y))
            out = builder.emit_output(relax.op.matmul(y, y))
        builder.emit_func_output(out)
    mod = with_weights(builder.get(), {"w": np.zeros((4, 4), np.float32)})
    with pytest.raises(ModelError, match="16 zero weights of w nonzero"):
        checked(mod, changes("w", np.ones_like))
