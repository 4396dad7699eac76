"""Sparse or dense, and the reason that the report gives."""

import numpy as np
import pytest

from pumice.passes.choose_kernel import choose_blocks, choose_slices
from pumice.schedules.blocks import Blocks, expand_groups
from pumice.schedules.costs import costs_of
from pumice.schedules.gemv import Slices
from pumice.targets.isa import isa

ISAS = ("vnni512", "avx512bw", "avxvnni", "avx2", "portable")


def rows_with(zeros, n=64, taps=1, c=256, dtype=np.int8, seed=0):
    """Weights of which this share of the 1x4 blocks is zero."""
    rng = np.random.default_rng(seed)
    keep = np.repeat(rng.random((n, taps, c // 4)) >= zeros, 4, axis=2)
    return (rng.integers(1, 128, (n, taps, c)) * keep).astype(dtype)


@pytest.mark.parametrize("name", ISAS)
def test_a_full_weight_runs_dense(name):
    choice = choose_blocks(rows_with(0.0), isa(name))
    assert choice.weight.is_dense and choice.kernel == f"dense int8 {name}"
    assert "zero" in choice.reason


@pytest.mark.parametrize("name", ISAS)
def test_ninety_percent_zeros_run_sparse(name):
    choice = choose_blocks(rows_with(0.9, taps=9), isa(name))
    assert not choice.weight.is_dense and choice.weight.shared == 1
    assert choice.kernel == f"sparse 1x4 int8 {name}"
    assert "10% of" in choice.reason and "blocks" in choice.reason


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("zeros", [0.3, 0.5, 0.7, 0.9])
def test_the_choice_is_the_cheapest_by_the_table(name, zeros):
    rows = rows_with(zeros)
    costs, choice = costs_of(name, "int8"), choose_blocks(rows, isa(name))
    words = rows.reshape(64, 1, 64, 4).any(axis=3)
    times = {
        "dense": words.size * costs.dense,
        "sparse 1x4": words.sum() * costs.sparse,
        "sparse 4x4": words.reshape(16, 4, -1).any(axis=1).sum() * 4 * costs.shared,
    }
    assert choice.kernel.startswith(min(times, key=times.get))


def test_half_the_blocks_left_gives_the_share_in_the_reason():
    choice = choose_blocks(rows_with(0.4), isa("vnni512"))
    assert choice.weight.is_dense and "% of its 1x4 blocks are left" in choice.reason


def test_rows_that_share_their_blocks_take_the_shared_form():
    rows = np.repeat(rows_with(0.8, n=16), 4, axis=0)
    choice = choose_blocks(rows, isa("vnni512"))
    assert choice.weight.shared == 4 and "4x4" in choice.kernel and "4x4" in choice.reason


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_a_weight_of_zeros_keeps_nothing(dtype):
    rows = np.zeros((8, 9, 12), dtype)
    choice = choose_blocks(rows, isa("vnni512"))
    assert isinstance(choice.weight, Blocks) and choice.weight.work == 0 and choice.kernel.startswith("sparse")
    vector = choose_slices(rows[:, :1], isa("vnni512"))
    assert isinstance(vector.weight, Slices) and vector.weight.work == 0 and "sparse" in vector.kernel
    assert choice.reason and vector.reason


@pytest.mark.parametrize("name", ISAS)
def test_depthwise_layers_are_sparse(name):
    rows = expand_groups(rows_with(0.0, n=64, taps=9, c=4)[:, :, :1], 64)
    choice = choose_blocks(rows, isa(name))
    assert "sparse" in choice.kernel and choice.weight.work <= 64 * 9 * 4


@pytest.mark.parametrize("name", ISAS)
def test_one_row_streams_what_is_there(name):
    full, thin = (choose_slices(rows_with(zeros, c=1024), isa(name)) for zeros in (0.0, 0.97))
    assert full.weight.starts is None and full.kernel == f"gemv dense int8 {name}"
    assert thin.weight.starts is not None and thin.kernel == f"gemv sparse 1x4 int8 {name}"
    assert "padding included" in thin.reason


def test_float_blocks_are_single_weights():
    choice = choose_blocks(rows_with(0.9, dtype=np.float32), isa("avx2"))
    assert choice.kernel == "sparse 1x1 float32 avx2" and choice.weight.data.shape[2] == 1
