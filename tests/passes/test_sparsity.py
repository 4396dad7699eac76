import numpy as np
import pytest
from scripted import scripted
from tvm.script import ir as I
from tvm.script import relax as R

from pumice.module import layers_of, with_mask_sources
from pumice.passes import RecordLayers
from pumice.passes.sparsity import classify_zeros, zero_blocks
from pumice.record import LayerRecord


def dense(n=64, taps=9, c=62, seed=0):
    return np.random.default_rng(seed).standard_normal((n, taps, c)).astype(np.float32)


def with_blocks(rows, height, width, sparsity, seed=1):
    n, taps, c = rows.shape
    keep = np.random.default_rng(seed).random((-(-n // height), taps, -(-c // width))) >= sparsity
    return rows * keep.repeat(height, 0).repeat(width, 2)[:n, :, :c]


def with_groups(rows, n, m):
    rows = rows.copy()
    for start in range(0, rows.shape[2], m):
        group = rows[:, :, start : start + m]
        order = np.argsort(np.abs(group), axis=-1)
        np.put_along_axis(group, order[..., : max(0, group.shape[2] - n)], 0, axis=-1)
    return rows


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("pattern", ["1x4", "4x1", "4x4", "unstructured"])
def test_the_pattern_of_random_blocks_is_found(pattern, sparsity):
    height, width = {"unstructured": (1, 1)}.get(pattern) or map(int, pattern.split("x"))
    zeros = classify_zeros(with_blocks(dense(), height, width, sparsity))
    assert zeros.pattern == pattern
    assert abs(zeros.sparsity - sparsity) < 0.05


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "1:2", "2:8"])
def test_n_of_m_is_found(pattern):
    assert classify_zeros(with_groups(dense(), *map(int, pattern.split(":")))).pattern == pattern


def test_one_group_too_full_is_still_two_of_four_and_many_are_not():
    rows = with_groups(dense(), 2, 4)
    rows[0, 0, :4] = 1
    assert classify_zeros(rows).pattern == "2:4"
    rows[:, 0, :4] = 1
    assert classify_zeros(rows).pattern == "unstructured"


def test_blocks_survive_the_zeros_that_rounding_to_int8_makes():
    rows = with_blocks(dense(), 1, 4, 0.5)
    rounded = np.rint(rows * 127 / np.abs(rows).max(axis=(1, 2), keepdims=True)).astype(np.int8)
    assert (rounded == 0).mean() > (rows == 0).mean()
    assert classify_zeros(rounded).pattern == "1x4"
    assert classify_zeros(np.rint(dense() * 127 / 4).astype(np.int8)).pattern == "dense"


def test_extremes():
    assert classify_zeros(dense()).pattern == "dense"
    empty = classify_zeros(np.zeros((8, 1, 8), np.float32))
    assert (empty.pattern, empty.sparsity, empty.block_sparsity) == ("4x4", 1.0, 1.0)
    depthwise = with_blocks(dense(64, 9, 1), 1, 1, 0.5)
    assert classify_zeros(depthwise).pattern == "unstructured"
    one_row = with_blocks(dense(1, 1, 400), 1, 4, 0.5)
    assert classify_zeros(one_row).pattern == "1x4"


@pytest.mark.parametrize(("height", "width"), [(1, 4), (4, 1), (4, 4), (1, 1)])
def test_zero_blocks_against_loops(height, width):
    zero = np.random.default_rng(2).random((6, 2, 7)) < 0.8
    blocks = zero_blocks(zero, height, width)
    for i, t, j in np.ndindex(blocks.shape):
        assert blocks[i, t, j] == zero[i * height : (i + 1) * height, t, j * width : (j + 1) * width].all()


@I.ir_module
class Network:
    @R.function
    def main(
        x: R.Tensor((1, 8, 6, 6), "float32"),
        conv__weight: R.Tensor((16, 8, 3, 3), "float32"),
        conv__bias: R.Tensor((1, 16, 1, 1), "float32"),
        fc__weight: R.Tensor((16, 10), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            h = R.nn.conv2d(x, conv__weight, padding=1)
            a = R.add(h, conv__bias)
            p = R.mean(a, axis=[2, 3])
            y = R.matmul(p, fc__weight)
            R.output(y)
        return y


def test_records():
    weight = with_blocks(dense(16, 9, 8), 1, 4, 0.5).transpose(0, 2, 1)
    records = layers_of(RecordLayers()(scripted(Network, conv__weight=weight)))
    conv, fc = records["conv"], records["fc"]
    assert list(records) == ["conv", "fc"]
    assert (conv.operator, conv.weight, conv.shape) == ("conv2d", "conv.weight", (16, 8, 3, 3))
    assert conv.macs == 16 * 6 * 6 * 8 * 9
    assert conv.source_bytes == 4 * (16 * 8 * 9 + 16)
    assert (conv.pattern, conv.pruned_by) == ("1x4", "zeros found")
    assert conv.sparsity == conv.block_sparsity == (weight == 0).mean()
    assert (fc.pattern, fc.pruned_by, fc.macs, fc.source_bytes) == ("dense", "", 160, 640)


def test_records_name_the_mask_and_keep_what_earlier_stages_wrote():
    weight = with_blocks(dense(16, 9, 8), 1, 4, 0.5).transpose(0, 2, 1)
    mod = with_mask_sources(scripted(Network, conv__weight=weight), {"conv.weight": "side file masks.npz"})
    mod = RecordLayers()(mod)
    assert layers_of(mod)["conv"].pruned_by == "side file masks.npz"
    assert isinstance(layers_of(mod)["conv"], LayerRecord)
    again = RecordLayers()(mod)
    assert layers_of(again) == layers_of(mod)
