import numpy as np
import pytest
from scripted import assert_rewrites, assert_same_numbers, scripted
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.errors import ModelError
from pumice.module import mask_sources_of, weights_of
from pumice.passes import FoldMasks

MASK = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]], np.float32)


@I.ir_module
class Masked:
    @R.function
    def main(
        x: R.Tensor((2, 3), "float32"),
        fc__weight_orig: R.Tensor((3, 4), "float32"),
        fc__weight_mask: R.Tensor((3, 4), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = R.multiply(fc__weight_orig, fc__weight_mask)
            y = R.matmul(x, w)
            R.output(y)
        return y


@I.ir_module
class MaskFirst:
    @R.function
    def main(
        x: R.Tensor((2, 3), "float32"),
        fc__mask: R.Tensor((3, 4), "bool"),
        fc__weight: R.Tensor((3, 4), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            m = R.astype(fc__mask, "float32")
            w = R.multiply(m, fc__weight)
            y = R.matmul(x, w)
            R.output(y)
        return y


@I.ir_module
class Folded:
    @R.function
    def main(x: R.Tensor((2, 3), "float32"), fc__weight: R.Tensor((3, 4), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.matmul(x, fc__weight)
            R.output(y)
        return y


def test_a_masked_weight_keeps_its_source_name():
    before = scripted(Masked, fc__weight_mask=MASK)
    after = assert_rewrites(before, Folded, FoldMasks())
    assert list(weights_of(after)) == ["fc.weight"]
    assert mask_sources_of(after) == {"fc.weight": "torch.nn.utils.prune"}
    np.testing.assert_array_equal(weights_of(after)["fc.weight"], weights_of(before)["fc.weight_orig"] * MASK)
    assert_same_numbers(before, after)


def test_a_boolean_mask_on_the_left():
    before = scripted(MaskFirst, fc__mask=MASK)
    after = assert_rewrites(before, Folded, FoldMasks())
    assert mask_sources_of(after) == {"fc.weight": "mask in the model (fc.mask)"}
    np.testing.assert_array_equal(weights_of(after)["fc.weight"] == 0, MASK == 0)


def test_a_mask_of_ones_is_the_identity():
    before = scripted(Masked, fc__weight_mask=np.ones((3, 4)))
    after = FoldMasks()(before)
    np.testing.assert_array_equal(weights_of(after)["fc.weight"], weights_of(before)["fc.weight_orig"])


def test_masked_infinity_is_zero():
    weight = np.where(MASK == 0, np.inf, 1.0)
    after = FoldMasks()(scripted(Masked, fc__weight_orig=weight, fc__weight_mask=MASK))
    np.testing.assert_array_equal(weights_of(after)["fc.weight"], MASK)


@pytest.mark.parametrize("bad", [0.5, -1, np.nan])
def test_a_mask_that_is_not_zero_and_one_is_refused(bad):
    mask = MASK.copy()
    mask[1, 1] = bad
    with pytest.raises(ModelError, match=r"scripted: the mask fc.weight_mask has values other than 0 and 1"):
        FoldMasks()(scripted(Masked, fc__weight_mask=mask))


def test_two_weights_without_a_mask_among_them_are_left_alone():
    before = scripted(MaskFirst, fc__mask=np.ones((3, 4)))

    @I.ir_module
    class Scaled:
        @R.function
        def main(x: R.Tensor((2, 4), "float32"), a: R.Tensor((4,), "float32"), b: R.Tensor((4,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                s = R.multiply(a, b)
                y = R.multiply(x, s)
                R.output(y)
            return y

    assert_rewrites(scripted(Scaled, a=np.ones(4)), Scaled, FoldMasks())
    assert list(weights_of(FoldMasks()(before))) == ["fc.weight"]


def test_a_mask_larger_than_its_weight_is_refused():
    @I.ir_module
    class Mismatch:
        @R.function
        def main(
            x: R.Tensor((2, 3), "float32"), w_orig: R.Tensor((1, 4), "float32"), w_mask: R.Tensor((3, 4), "float32")
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                w = R.multiply(w_orig, w_mask)
                y = R.matmul(x, w)
                R.output(y)
            return y

    with pytest.raises(ModelError, match=r"the mask w_mask has shape \(3, 4\), which does not fit the weight w_orig"):
        FoldMasks()(scripted(Mismatch, w_mask=MASK))
