"""A weight as lists of blocks: nothing lost, nothing there that is zero."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.schedules.blocks import count_blocks, dense_blocks, expand_groups, sparse_blocks


def rebuilt(blocks):
    """``[N, taps, C]`` from the lists."""
    depth = blocks.data.shape[2]
    lists = blocks.rows // blocks.shared
    whole = np.zeros((lists, blocks.shared, blocks.taps * blocks.words, depth), blocks.data.dtype)
    if blocks.is_dense:
        data = blocks.data.reshape(lists, -1, blocks.shared, depth)
        whole[:, :, blocks.columns] = data.transpose(0, 2, 1, 3)
    else:
        for which in range(lists):
            for entry in range(blocks.starts[which], blocks.starts[which + 1]):
                whole[which, :, blocks.columns[entry]] = blocks.data[entry]
    return whole.reshape(blocks.rows, blocks.taps, blocks.words * depth)


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(1, 11), st.integers(1, 4), st.integers(1, 11),
    st.floats(0, 1), st.sampled_from([np.int8, np.float32]), st.sampled_from([0, 1, 4]),
)  # fmt: skip
def test_blocks_hold_the_weight(seed, n, taps, c, density, dtype, shared):
    rng = np.random.default_rng(seed)
    rows = (rng.integers(-128, 128, (n, taps, c)) * (rng.random((n, taps, c)) < density)).astype(dtype)
    blocks = dense_blocks(rows) if shared == 0 else sparse_blocks(rows, shared)
    whole = rebuilt(blocks)
    np.testing.assert_array_equal(whole[:n, :, :c], rows)
    assert not whole[n:].any() and not whole[:, :, c:].any()
    assert blocks.rows % 4 == 0 and blocks.data.flags.c_contiguous
    if shared:
        assert count_blocks(rows, shared) == len(blocks.data) == len(blocks.columns) == blocks.starts[-1]
        assert blocks.data.any(axis=(1, 2)).all()
        assert blocks.work == len(blocks.data) * shared
        assert blocks.nbytes == blocks.data.nbytes + blocks.columns.nbytes + blocks.starts.nbytes


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_expanded_groups_are_zero_outside_their_group(groups):
    rows = np.arange(1, 1 + 6 * 2 * 12 // groups, dtype=np.int8).reshape(6, 2, 12 // groups)
    full = expand_groups(rows, groups)
    assert full.shape == (6, 2, 12)
    for n in range(6):
        group = n // (6 // groups)
        begin = group * (12 // groups)
        np.testing.assert_array_equal(full[n, :, begin : begin + 12 // groups], rows[n])
        assert np.count_nonzero(full[n]) == np.count_nonzero(rows[n])


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 3), st.integers(1, 40),
    st.integers(1, 9), st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_lists_in_another_order_are_rows_in_another_order(seed, quads, taps, c, group, shared):
    rng = np.random.default_rng(seed)
    rows = (rng.integers(-128, 128, (4 * quads, taps, c)) * (rng.random((4 * quads, taps, c)) < 0.2)).astype(np.int8)
    ordered = sparse_blocks(rows, shared).ordered(group)
    np.testing.assert_array_equal(rebuilt(ordered), rebuilt(sparse_blocks(rows[ordered.order], shared)))
    assert sorted(ordered.order) == list(range(4 * quads))
    quad_of = ordered.order.reshape(-1, 4) // 4
    assert (quad_of == quad_of[:, :1]).all()


def test_lists_of_equal_length_follow_each_other():
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.random((1024, 1, 64)) < 0.1, 4, axis=2).astype(np.int8)
    blocks = sparse_blocks(rows, 1)
    ordered = blocks.ordered(64)

    def changes(starts):
        lengths = np.diff(starts).reshape(-1, 4)
        return np.count_nonzero(lengths[1:] != lengths[:-1]) / lengths[1:].size

    assert changes(ordered.starts) < 0.7 * changes(blocks.starts)
    work = np.add.reduceat(np.diff(ordered.starts), np.arange(0, 1024, 256))
    assert work.max() < 1.02 * work.mean()


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 4), st.integers(1, 40),
    st.integers(1, 12), st.sampled_from([0, 1, 2, 4]),
)  # fmt: skip
def test_a_tiled_weight_has_the_same_blocks_tile_by_tile(seed, n, taps, c, tile_words, shared):
    rng = np.random.default_rng(seed)
    rows = (rng.integers(-128, 128, (n, taps, c)) * (rng.random((n, taps, c)) < 0.3)).astype(np.int8)
    whole = dense_blocks(rows) if shared == 0 else sparse_blocks(rows, shared)
    tiled = whole.tiled(tile_words)
    lists, depth = tiled.rows // tiled.shared, 4
    assert tiled.tiles == -(-tiled.words // tiled.tile_words)
    again = np.zeros((lists, tiled.shared, taps * tiled.words, depth), np.int8)
    at = 0
    for tile in range(tiled.tiles):
        words = range(tile * tiled.tile_words, min(tiled.words, (tile + 1) * tiled.tile_words))
        inside = [t * tiled.words + w for w in words for t in range(taps)]
        for which in range(lists):
            if tiled.is_dense:
                columns = inside
                assert list(tiled.columns[words[0] * taps : (words[-1] + 1) * taps]) == columns
            else:
                columns = tiled.columns[tiled.starts[tile * lists + which] : tiled.starts[tile * lists + which + 1]]
                assert set(columns) <= set(inside)
            for column in columns:
                again[which, :, column] = tiled.data[at]
                at += 1
    assert at == len(tiled.data)
    np.testing.assert_array_equal(again.reshape(tiled.rows, taps, -1), rebuilt(whole))
