"""A weight as the blocks that are there: what the kernels walk.

The weight's rows view ``[N, taps, C]`` is cut into words of ``depth`` input channels (4 for int8, 1 for float32).
Output rows come in quads. A quad keeps either one list of blocks for each of its rows (``shared=1``: the 1x4 form)
or one list for all four (``shared=4``: the 4x4 form, with fill-in where a row has a hole); a dense weight keeps
all blocks in the same order for every quad and needs no lists of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

QUAD = 4  # output rows that are packed into one word


@dataclass(frozen=True)
class Blocks:
    """The blocks of one weight, in the order in which a kernel walks them.

    The reduction may be cut into *tiles* of ``tile_words`` input words each, so that the activations which a tile
    reads stay in the cache while all output rows pass over them. Blocks lie tile after tile, in a tile list after
    list, in a list word after word with the taps of a word side by side.

    data: int8 ``[count, shared, 4]`` or float32 ``[count, shared, 1]``
    columns: int32 ``[count]`` (``[taps * words]`` if dense): which word of the reduction a block multiplies,
        counted as ``tap * words + word``
    starts: int32 ``[tiles * lists + 1]``, where each list of each tile starts; None if dense
    order: int32 ``[rows]``, the output row that each row of the lists computes; None where they are in order
    """

    data: np.ndarray
    columns: np.ndarray
    starts: np.ndarray | None
    shared: int
    rows: int  # output rows, a multiple of 4 (the last ones may be padding)
    taps: int
    words: int  # words along the input channels
    tile_words: int
    order: np.ndarray | None = None

    @property
    def is_dense(self) -> bool:
        """Whether every block is there."""
        return self.starts is None

    @property
    def tiles(self) -> int:
        """How many tiles the reduction has."""
        return -(-self.words // self.tile_words)

    @property
    def work(self) -> int:
        """Words multiplied for each position: what the kernel's time is proportional to."""
        return int(self.data.shape[0]) * self.shared

    @property
    def nbytes(self) -> int:
        """Bytes stored: weights and lists."""
        starts = 0 if self.starts is None else self.starts.nbytes
        return self.data.nbytes + self.columns.nbytes + starts

    def ordered(self, quads: int) -> Blocks:
        """Sparse blocks of a single tile with lists of equal length one after the other.

        A CPU foresees the end of a loop that takes as many steps as the one before it. What is free is the order of
        the quads, in groups of ``quads`` that threads share out and that must take equally long, and the order of
        the lists within a quad.
        """
        assert self.starts is not None and self.tiles == 1 and self.order is None
        each = QUAD // self.shared
        counts = np.diff(self.starts).reshape(-1, each)
        within = np.argsort(counts, axis=1, kind="stable")
        by_length = np.lexsort(np.take_along_axis(counts, within, axis=1).T[::-1])
        groups = -(-len(counts) // quads)
        dealt = np.concatenate([by_length[group::groups] for group in range(groups)])
        lists = (dealt[:, None] * each + within[dealt]).ravel()
        order = (lists[:, None] * self.shared + np.arange(self.shared)).ravel()
        return replace(self._with_lists(lists), order=order.astype(np.int32))

    def _with_lists(self, lists: np.ndarray) -> Blocks:
        assert self.starts is not None
        counts = np.diff(self.starts)[lists]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        source = np.arange(starts[-1]) + np.repeat(self.starts[lists] - starts[:-1], counts)
        return replace(self, data=self.data[source], columns=self.columns[source], starts=starts)

    def tiled(self, tile_words: int) -> Blocks:
        """The same blocks, of a single tile, cut into tiles of ``tile_words``."""
        lists = self.rows // self.shared
        if tile_words >= self.words:
            return self
        if self.starts is None:
            columns, which = np.tile(self.columns, lists), np.repeat(np.arange(lists), len(self.columns))
        else:
            columns, which = self.columns, np.repeat(np.arange(lists), np.diff(self.starts))
        place = columns % self.words // tile_words * lists + which
        order = np.argsort(place, kind="stable")
        data = np.ascontiguousarray(self.data[order])
        if self.starts is None:
            return replace(self, data=data, tile_words=tile_words)
        starts = np.zeros(-(-self.words // tile_words) * lists + 1, np.int32)
        np.cumsum(np.bincount(place, minlength=len(starts) - 1), out=starts[1:])
        return replace(self, data=data, columns=self.columns[order], starts=starts, tile_words=tile_words)


def dense_blocks(rows: np.ndarray) -> Blocks:
    """Every block of ``rows`` ``[N, taps, C]``, four output rows sharing each."""
    words = _words(rows)
    quads, _, count, taps, depth = words.shape
    data = words.transpose(0, 2, 3, 1, 4).reshape(-1, QUAD, depth)
    columns = _columns(count, taps)
    return Blocks(np.ascontiguousarray(data), columns, None, QUAD, quads * QUAD, taps, count, count)


def sparse_blocks(rows: np.ndarray, shared: int) -> Blocks:
    """The blocks of ``rows`` ``[N, taps, C]`` that are not all zero, in lists for each ``shared`` (1, 2, 4) rows."""
    words = _words(rows)
    quads, _, count, taps, depth = words.shape
    lists = words.reshape(quads * QUAD // shared, shared, count * taps, depth).transpose(0, 2, 1, 3)
    present = lists.any(axis=(2, 3))
    which, column = np.nonzero(present)
    starts = np.zeros(len(lists) + 1, np.int32)
    np.cumsum(present.sum(axis=1), out=starts[1:])
    data = np.ascontiguousarray(lists[which, column])
    return Blocks(data, _columns(count, taps)[column], starts, shared, quads * QUAD, taps, count, count)


def count_blocks(rows: np.ndarray, shared: int) -> int:
    """How many blocks ``sparse_blocks`` would keep."""
    words = _words(rows)
    quads, _, count, taps, depth = words.shape
    return int(words.reshape(quads * QUAD // shared, shared, count * taps, depth).any(axis=(1, 3)).sum())


def _words(rows: np.ndarray) -> np.ndarray:
    """``[N, taps, C]`` -> ``[quads, 4, words, taps, depth]``, padded with zeros."""
    depth = 4 if rows.dtype == np.int8 else 1
    n, taps, c = rows.shape
    padded = np.pad(rows, ((0, -n % QUAD), (0, 0), (0, -c % depth)))
    return padded.reshape(-1, QUAD, taps, padded.shape[2] // depth, depth).swapaxes(2, 3)


def _columns(words: int, taps: int) -> np.ndarray:
    """``tap * words + word`` of every column, word after word: a word's taps read the same lines of the input."""
    return np.asarray(np.arange(taps) * words + np.arange(words)[:, None], np.int32).ravel()


def has_lowest_pairs(data: np.ndarray) -> bool:
    """Whether two of -128 are neighbours in half a word: the one product that does not fit int16 with its neighbour."""
    return data.dtype == np.int8 and bool((data.reshape(-1, 2) == -128).all(axis=1).any())


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
