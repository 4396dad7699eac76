"""A weight in slices: every block once, in order of the lanes, and no window beyond the input."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.schedules.slices import UNROLL, sharing, slice_rows, window
from pumice.targets.isa import isa


def matrix(rng, n, k, density):
    """int8 ``[N, K]``, blocks of four missing."""
    keep = rng.random((n, -(-k // 4))) < density
    return (rng.integers(-128, 128, (n, k)) * np.repeat(keep, 4, axis=1)[:, :k]).astype(np.int8)


@settings(max_examples=60)
@given(
    isa_name=st.sampled_from(["vnni512", "avx2", "portable"]),
    seed=st.integers(0, 10**6),
    n=st.integers(1, 300),
    k=st.integers(1, 1500),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([np.int8, np.float32]),
    positions=st.sampled_from([1, 2]),
)
def test_sparse_slices_hold_every_block_once(isa_name, seed, n, k, density, dtype, positions):
    target = isa(isa_name)
    depth = 4 if dtype == np.int8 else 1
    weight = (matrix(np.random.default_rng(seed), n, k, density)).astype(dtype)
    slices = slice_rows(weight[:, None, :], target, True, positions)
    width = window(target, positions)
    lists, words = slices.lists, -(-k // depth)
    assert slices.words == words and slices.work == len(slices.data)
    # Nothing outside the input is read, unless the input is narrower than a window: the kernel then makes a copy.
    assert (lists.windows >= 0).all() and (lists.windows <= max(words - width, 0)).all()
    assert (lists.columns < width).all()
    assert lists.starts[0] == 0 and (np.diff(lists.starts) >= 0).all() and lists.starts[-1] * UNROLL == slices.work
    stored = -(-n // target.lanes) * target.lanes
    np.testing.assert_array_equal(np.sort(lists.order), np.arange(stored))
    rows = -(-n // 4) * 4
    np.testing.assert_array_equal(np.sort(lists.order[:rows]), np.arange(rows))  # what is not stored comes last
    word = np.repeat(lists.windows, sharing(target, positions))[:, None] + lists.columns
    which = np.repeat(np.arange(len(lists.starts) - 1), np.diff(lists.starts) * UNROLL)
    row = lists.order.reshape(-1, target.lanes)[which]
    there = slices.data.any(axis=2)
    assert word[there].max(initial=0) < words
    assert len(set(zip(row[there], word[there], strict=True))) == there.sum()
    rebuilt = np.zeros((stored, words, depth), dtype)
    rebuilt[row[there], word[there]] = slices.data[there]
    np.testing.assert_array_equal(rebuilt.reshape(stored, -1)[:n, :k], weight)
    assert not rebuilt.reshape(stored, -1)[:, k:].any() and not rebuilt[n:].any()


def test_bytes_and_numbers_follow_the_order_of_the_lanes():
    weight = matrix(np.random.default_rng(4), 37, 64, 0.2)[:, None, :]
    dense, sparse = (slice_rows(weight, isa("vnni512"), sparse=is_sparse) for is_sparse in (False, True))
    arrays = sparse.lists.arrays.values()
    assert sparse.nbytes == sparse.data.nbytes + sum(array.nbytes for array in arrays)
    assert dense.nbytes == dense.data.nbytes == 48 * 64
    numbers = np.arange(1, 38)
    np.testing.assert_array_equal(dense.per_row(numbers), np.pad(numbers, (0, 11)))
    np.testing.assert_array_equal(sparse.per_row(numbers), np.pad(numbers, (0, 11))[sparse.lists.order])
