"""A weight as the blocks that are there: what the kernels walk.

The weight's rows view ``[N, taps, C]`` is cut into words of ``depth`` input channels (4 for int8, 1 for float32).
Output rows come in quads. A quad keeps either one list of blocks for each of its rows (``shared=1``: the 1x4 form)
or one list for all four (``shared=4``: the 4x4 form, with fill-in where a row has a hole); a dense weight keeps
all blocks in the same order for every quad and needs no lists of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

QUAD = 4  # output rows that are packed into one word


@dataclass(frozen=True)
class Blocks:
    """The blocks of one weight.

    data: int8 ``[count, shared, 4]`` or float32 ``[count, shared, 1]``, list after list
    columns: int32 ``[count]`` (``[taps * words]`` if dense): which word of the reduction a block multiplies,
        counted as ``tap * words + word``
    starts: int32 ``[quads * 4 / shared + 1]``: where each list starts; None if dense
    """

    data: np.ndarray
    columns: np.ndarray
    starts: np.ndarray | None
    shared: int
    rows: int  # output rows, a multiple of 4 (the last ones may be padding)
    taps: int
    words: int  # words along the input channels

    @property
    def is_dense(self) -> bool:
        """Whether every block is there."""
        return self.starts is None

    @property
    def work(self) -> int:
        """Words multiplied for each position: what the kernel's time is proportional to."""
        return int(self.data.shape[0]) * self.shared

    @property
    def nbytes(self) -> int:
        """Bytes stored: weights and lists."""
        starts = 0 if self.starts is None else self.starts.nbytes
        return self.data.nbytes + self.columns.nbytes + starts


def dense_blocks(rows: np.ndarray) -> Blocks:
    """Every block of ``rows`` ``[N, taps, C]``, four output rows sharing each."""
    words = _words(rows)
    quads, _, taps, count, depth = words.shape
    data = words.transpose(0, 2, 3, 1, 4).reshape(-1, QUAD, depth)
    columns = np.arange(taps * count, dtype=np.int32)
    return Blocks(np.ascontiguousarray(data), columns, None, QUAD, quads * QUAD, taps, count)


def sparse_blocks(rows: np.ndarray, shared: int) -> Blocks:
    """The blocks of ``rows`` ``[N, taps, C]`` that are not all zero, in lists for each ``shared`` (1 or 4) rows."""
    words = _words(rows)
    quads, _, taps, count, depth = words.shape
    lists = words.reshape(quads * QUAD // shared, shared, taps * count, depth).transpose(0, 2, 1, 3)
    present = lists.any(axis=(2, 3))
    which, columns = np.nonzero(present)
    starts = np.zeros(len(lists) + 1, np.int32)
    np.cumsum(present.sum(axis=1), out=starts[1:])
    data = np.ascontiguousarray(lists[which, columns])
    return Blocks(data, columns.astype(np.int32), starts, shared, quads * QUAD, taps, count)


def count_blocks(rows: np.ndarray, shared: int) -> int:
    """How many blocks ``sparse_blocks`` would keep."""
    words = _words(rows)
    quads, _, taps, count, depth = words.shape
    return int(words.reshape(quads * QUAD // shared, shared, taps * count, depth).any(axis=(1, 3)).sum())


def _words(rows: np.ndarray) -> np.ndarray:
    """``[N, taps, C]`` -> ``[quads, 4, taps, words, depth]``, padded with zeros."""
    depth = 4 if rows.dtype == np.int8 else 1
    n, taps, c = rows.shape
    padded = np.pad(rows, ((0, -n % QUAD), (0, 0), (0, -c % depth)))
    return padded.reshape(-1, QUAD, taps, padded.shape[2] // depth, depth)


def expand_groups(rows: np.ndarray, groups: int) -> np.ndarray:
    """Grouped rows ``[N, taps, C/groups]`` as ordinary rows ``[N, taps, C]``, with zeros outside each group.

    Grouped and depthwise convolutions are then block-sparse ones.
    """
    if groups == 1:
        return rows
    n, taps, c = rows.shape
    full = np.zeros((n, taps, c * groups), rows.dtype)
    per_group = n // groups
    for group in range(groups):
        block = slice(group * per_group, (group + 1) * per_group)
        full[block, :, group * c : (group + 1) * c] = rows[block]
    return full
