import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import scripted
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.errors import ModelError, UsageError
from pumice.module import layers_of, weights_of
from pumice.passes import Prune
from pumice.passes.prune_spec import Magnitude
from pumice.patterns import Pattern


@I.ir_module
class Network:
    @R.function
    def main(
        x: R.Tensor((1, 6, 5, 5), "float32"),
        stem__weight: R.Tensor((10, 6, 3, 3), "float32"),
        dw__weight: R.Tensor((10, 1, 3, 3), "float32"),
        head__weight: R.Tensor((10, 7), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            h = R.nn.conv2d(x, stem__weight, padding=1)
            d = R.nn.conv2d(h, dw__weight, padding=1, groups=10)
            p = R.mean(d, axis=[2, 3])
            y = R.matmul(p, head__weight)
            R.output(y)
        return y


def rows(mod, name):
    weight = weights_of(mod)[name]
    return weight.T[:, None] if weight.ndim == 2 else weight.reshape(*weight.shape[:2], -1).transpose(0, 2, 1)


def blocks(weight_rows, height, width):
    """Every block's values, by loops: blocks at the edges are shorter."""
    n, taps, c = weight_rows.shape
    return [
        weight_rows[i : i + height, t, j : j + width]
        for i in range(0, n, height)
        for t in range(taps)
        for j in range(0, c, width)
    ]


def zero_count(parts):
    return sum(not part.any() for part in parts)


SIZES = {"unstructured": (1, 1), "1x4": (1, 4), "4x1": (4, 1), "2x4": (2, 4), "4x4": (4, 4), "16x4": (16, 4)}


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("pattern", SIZES)
@settings(max_examples=8, deadline=None)
@given(amount=st.floats(0, 1))
def test_exactly_the_asked_share_of_the_smallest_blocks_goes(pattern, norm, amount):
    before = scripted(Network)
    after = Prune(Magnitude(Pattern.parse(pattern), amount, norm=norm))(before)
    for name in ("stem.weight", "head.weight"):
        old, new = (blocks(rows(mod, name), *SIZES[pattern]) for mod in (before, after))
        assert zero_count(new) == round(amount * len(old))
        power = {"l1": 1, "l2": 2}[norm]
        size = [float((np.abs(b.astype(np.float64)) ** power).sum()) for b in old]
        gone = [s for s, b in zip(size, new, strict=True) if not b.any()]
        left = [s for s, b in zip(size, new, strict=True) if b.any()]
        assert not gone or not left or max(gone) <= min(left) * (1 + 1e-12)
        for a, b in zip(old, new, strict=True):
            assert not b.any() or (a == b).all()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_n_of_m_keeps_the_n_largest_of_each_group(n, m):
    before = scripted(Network)
    after = Prune(f"magnitude:{n}:{m}")(before)
    for name in ("stem.weight", "head.weight"):
        for old, new in zip(blocks(rows(before, name), 1, m), blocks(rows(after, name), 1, m), strict=True):
            largest = set(np.argsort(-np.abs(old[0]))[:n])
            assert set(np.flatnonzero(new[0])) == largest


def test_global_ranks_all_layers_together():
    before = scripted(Network)
    small = weights_of(before)["stem.weight"] * np.float32(1e-3)
    before = scripted(Network, stem__weight=small)
    after = Prune("magnitude:1x4:0.6:global")(before)
    parts = {name: blocks(rows(after, name), 1, 4) for name in ("stem.weight", "head.weight")}
    assert sum(map(zero_count, parts.values())) == round(0.6 * sum(map(len, parts.values())))
    assert zero_count(parts["head.weight"]) == 0


def test_existing_zeros_count_and_are_never_revived():
    weight = np.random.default_rng(0).standard_normal((10, 6, 3, 3))
    weight[:5] = 0
    before = scripted(Network, stem__weight=weight)
    at_half = Prune("magnitude:1x4:0.5:keep=head")(before)
    np.testing.assert_array_equal(weights_of(at_half)["stem.weight"], weights_of(before)["stem.weight"])
    further = weights_of(Prune("magnitude:1x4:0.7")(before))["stem.weight"]
    assert (further[:5] == 0).all()
    assert zero_count(blocks(rows(Prune("magnitude:1x4:0.2")(before), "stem.weight"), 1, 4)) == 10 * 9 * 2 // 2


def test_twice_over_gives_the_same():
    once = Prune("magnitude:4x1:0.75")(scripted(Network))
    twice = Prune("magnitude:4x1:0.75")(once)
    for name, value in weights_of(once).items():
        np.testing.assert_array_equal(weights_of(twice)[name], value)
    assert layers_of(twice) == layers_of(once)


def test_of_equals_the_first_goes():
    after = Prune("magnitude:unstructured:0.3")(scripted(Network, head__weight=np.ones((10, 7))))
    flat = rows(after, "head.weight").ravel()
    np.testing.assert_array_equal(flat, [0] * 21 + [1] * 49)


def test_records_say_what_happened_and_why_not():
    records = layers_of(Prune("magnitude:1x4:0.5:keep=he*")(scripted(Network)))
    assert records["stem"].pruned_by == "magnitude:1x4:0.5:keep=he*"
    assert (records["stem"].pattern, records["stem"].block_sparsity) == ("1x4", 0.5)
    assert records["head"].notes == ["not pruned: keep=he*"]
    assert records["head"].pruned_by == ""
    assert records["dw"].notes == [
        "not pruned: depthwise, each output channel reads one input channel, so there is no 1x4"
    ]
    depthwise = layers_of(Prune("magnitude:unstructured:0.5")(scripted(Network)))["dw"]
    assert depthwise.sparsity == 0.5


def test_zeros_found_then_pruned():
    weight = np.random.default_rng(0).standard_normal((10, 6, 3, 3))
    weight[:2] = 0
    record = layers_of(Prune("magnitude:unstructured:0.5")(scripted(Network, stem__weight=weight)))["stem"]
    assert record.pruned_by == "zeros found, then magnitude:unstructured:0.5"


def test_int8_weights_are_compared_by_what_they_stand_for():
    @I.ir_module
    class Quantized:
        @R.function
        def main(x: R.Tensor((1, 8), "float32"), w: R.Tensor((8, 2), "int8"), w__scale: R.Tensor((2,), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                f = R.dequantize(w, w__scale, R.const(0, "int8"), axis=1)
                y = R.matmul(x, f)
                R.output(y)
            return y

    before = scripted(Quantized, w=np.stack([np.full(8, 100), np.full(8, 10)], 1), w__scale=[0.01, 1.0])
    after = weights_of(Prune("magnitude:1x4:0.5")(before))["w"]
    assert after.dtype == np.int8
    np.testing.assert_array_equal(after[:, 0], 0)
    np.testing.assert_array_equal(after[:, 1], 10)


def test_a_shared_weight_is_kept_if_one_layer_keeps_it():
    @I.ir_module
    class Tied:
        @R.function
        def main(x: R.Tensor((2, 4), "float32"), fc__weight: R.Tensor((4, 4), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                h = R.matmul(x, fc__weight)
                y = R.matmul(h, fc__weight)
                R.output(y)
            return y

    assert weights_of(Prune("magnitude:1x4:0.5:keep=fc#2")(scripted(Tied)))["fc.weight"].all()
    assert not weights_of(Prune("magnitude:1x4:0.5")(scripted(Tied)))["fc.weight"].all()


def test_a_weight_that_is_not_finite_is_refused():
    weight = np.ones((10, 7))
    weight[3, 3] = np.nan
    with pytest.raises(ModelError, match=r"scripted: the weight head.weight has values that are not finite"):
        Prune("magnitude:1x4:0.5")(scripted(Network, head__weight=weight))


def test_a_keep_that_names_no_layer_is_refused():
    with pytest.raises(UsageError, match=r"keep=hat\* names no layer of scripted; its layers are stem, dw, head"):
        Prune("magnitude:1x4:0.5:keep=hat*")(scripted(Network))


def test_an_all_zero_layer_stays_as_it_is():
    before = scripted(Network, head__weight=np.zeros((10, 7)))
    after = Prune("magnitude:4x4:0.5")(before)
    assert not weights_of(after)["head.weight"].any()
    assert layers_of(after)["head"].block_sparsity == 1
