"""A weight in slices of output rows: what the kernel for few positions walks.

A *slice* is as many output rows as a vector has lanes, one row a lane. Dense, its entries are the words of the input
in order. Sparse, each row has its own list, and the lists of a slice are padded to one length (SELL-C-sigma of
Kreutzer et al., SIAM J. Sci. Comput. 36-5, 2014, with int8 words for elements). What is new is that no lane gathers
from memory: an entry has a *window* of the input, one vector or a few that some entries share in registers, and a
permutation brings each lane the word that it wants. A lane that has nothing to do in the window of the others
multiplies by zero; rows that go together badly are kept apart by their order, which the kernel's stores undo.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pumice.targets.isa import Isa

UNROLL = 4  # entries of a sparse slice at once, each with an accumulator of its own: they hide the latency
PANEL = 8  # slices of a dense weight that are walked together, sharing each word of the input, at most
ALIKE = 8  # slices whose rows are as good as equally long, and may be dealt by where in a row the words lie


@dataclass(frozen=True)
class Lists:
    """Which words of the input a sparse slice multiplies.

    columns: uint8 ``[count, lanes]``, the word of each lane, counted from the start of the entry's window
    windows: int32 ``[count / sharing]``, the word at which the window of so many entries starts
    starts: int32 ``[slices + 1]``, where the entries of each slice start, in units of UNROLL
    order: int32 ``[slices * lanes]``, the output row of each lane; those that are padding come last
    """

    columns: np.ndarray
    windows: np.ndarray
    starts: np.ndarray
    order: np.ndarray

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arguments of the kernel, in its order."""
        return {"columns": self.columns, "windows": self.windows, "starts": self.starts, "order": self.order}


@dataclass(frozen=True)
class Slices:
    """A weight in slices of ``lanes`` output rows.

    data: int8 ``[count, lanes, 4]`` or float32 ``[count, lanes, 1]``. Sparse: entry after entry, slice after slice;
        dense: panel after panel, word after word, slice after slice
    lists: None if dense
    words: words of the input
    """

    data: np.ndarray
    lists: Lists | None
    words: int

    @property
    def is_dense(self) -> bool:
        """Whether every word is there."""
        return self.lists is None

    @property
    def work(self) -> int:
        """Vector products."""
        return int(self.data.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes stored: weights and lists."""
        return self.data.nbytes + (sum(array.nbytes for array in self.lists.arrays.values()) if self.lists else 0)

    def per_row(self, values: np.ndarray) -> np.ndarray:
        """``values`` ``[N]``, one for each output row, as the kernel reads them: padded, in the order of the lanes."""
        padded: np.ndarray = np.pad(values, (0, -len(values) % self.data.shape[1]))
        return padded if self.lists is None else padded[self.lists.order]


def window(isa: Isa, positions: int) -> int:
    """Words in a window. One position waits for the weights, and few entries are best; several wait for the
    permutations, and a window of two vectors is one instruction."""
    return isa.window if positions == 1 or isa.permute is None else min(isa.window, 2 * isa.lanes)


def sharing(isa: Isa, positions: int) -> int:
    """Entries that share a window, so that each pays for one vector of it."""
    return min(UNROLL, window(isa, positions) // isa.lanes)


def panels(slices: int, isa: Isa, positions: int = 1) -> list[tuple[int, int]]:
    """First slice and size of each panel: as few panels as may be, the larger ones first.

    Each slice of a panel has an accumulator for each position, in three quarters of the registers.
    """
    count = -(-slices // min(PANEL, max(1, isa.registers * 3 // 4 // positions)))
    smaller, larger = divmod(slices, count)
    return [(i * smaller + min(i, larger), smaller + (i < larger)) for i in range(count)]


def slice_rows(rows: np.ndarray, isa: Isa, sparse: bool, positions: int = 1) -> Slices:
    """Slices of ``rows`` ``[N, 1, C]``, int8 or float32, for a kernel with so many positions."""
    depth = 4 if rows.dtype == np.int8 else 1
    matrix = np.pad(rows[:, 0, :], ((0, -len(rows) % isa.lanes), (0, -rows.shape[2] % depth)))
    words = matrix.reshape(len(matrix), -1, depth)
    return _sparse(words, isa, positions) if sparse else _dense(words, isa, positions)


def _dense(words: np.ndarray, isa: Isa, positions: int) -> Slices:
    slices = words.reshape(-1, isa.lanes, *words.shape[1:])
    parts = [slices[first : first + size].transpose(2, 0, 1, 3) for first, size in panels(len(slices), isa, positions)]
    data = np.concatenate([part.reshape(-1, isa.lanes, words.shape[2]) for part in parts])
    return Slices(data, None, words.shape[1])


def _sparse(words: np.ndarray, isa: Isa, positions: int) -> Slices:
    order = _order(np.any(words, axis=2), isa.lanes)
    slices = words[order].reshape(-1, isa.lanes, *words.shape[1:])
    lists, before = _lists(slices.any(axis=3))
    width, share = window(isa, positions), sharing(isa, positions)
    which, windows, first, taken = _cover(lists, before, width, share)
    starts = np.zeros(len(slices) + 1, np.int32)
    np.cumsum(np.bincount(which, minlength=len(slices)) * share // UNROLL, out=starts[1:])
    # A window serves the next words, ``share`` at most, of each lane's list: [windows, share, lanes].
    step = np.arange(share)[:, None]
    is_taken = step < taken[:, None, :]
    lane = np.arange(isa.lanes)
    word = np.where(is_taken, lists[which[:, None, None], lane, first[:, None, :] + step], 0)
    data = np.where(is_taken[..., None], slices[which[:, None, None], lane, word], 0).astype(words.dtype)
    columns = np.where(is_taken, word - windows[:, None, None], 0).astype(np.uint8)
    lanes, depth = isa.lanes, words.shape[2]
    tables = Lists(columns.reshape(-1, lanes), windows, starts, order)
    return Slices(data.reshape(-1, lanes, depth), tables, words.shape[1])


def _order(present: np.ndarray, lanes: int) -> np.ndarray:
    """The longest rows first, so that those of a slice are about as long; among ALIKE slices by their first half.

    A window moves on when its slowest lane does: rows whose words are spread alike keep up with each other.
    """
    total = present.sum(axis=1)
    rank = np.empty(len(present), np.int32)
    rank[np.argsort(-total, kind="stable")] = np.arange(len(present))
    first_half = present[:, : present.shape[1] // 2].sum(axis=1)
    return np.lexsort((-first_half, rank // (ALIKE * lanes))).astype(np.int32)


def _cover(
    lists: np.ndarray, before: np.ndarray, width: int, share: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Windows over the ``_lists`` of all slices; greedy, which is the fewest.

    A window starts at the first word that is still to be done in any lane, and every lane takes its next words in
    it, ``share`` at most. All slices in lockstep. Gives, slice after slice, each padded to whole UNROLLs: the
    window's slice and start ``[windows]``, and the place in each lane's list and how many it takes
    ``[windows, lanes]``.
    """
    slices, lanes, words = before.shape[0], before.shape[1], before.shape[2] - 1
    slice_, lane = np.arange(slices)[:, None], np.arange(lanes)
    done = np.zeros((slices, lanes), np.int32)
    steps: list[tuple[np.ndarray, ...]] = []
    unit = UNROLL // share
    while True:
        start = lists[slice_, lane, done].min(axis=1)
        active = start < words
        if len(steps) % unit == 0 and not active.any():
            break
        start = np.minimum(start, max(words - width, 0))
        end = np.where(active, np.minimum(start + width, words), 0)
        taken = np.clip(before[slice_, lane, end[:, None]] - done, 0, share)
        steps.append((active, start, done, taken))
        done = done + taken
    if not steps:
        none = np.zeros((0, lanes), np.int32)
        return none[:, 0], none[:, 0], none, none
    active, start, first, taken = (np.stack(parts, axis=1) for parts in zip(*steps, strict=True))
    kept = np.repeat(active[:, ::unit], unit, axis=1)
    return np.nonzero(kept)[0], start[kept].astype(np.int32), first[kept], taken[kept]


def _lists(present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ``present`` ``[slices, lanes, words]``: each lane's words in order, and how many lie before each word.

    Behind a list stands ``words``, UNROLL times at least.
    """
    slices, lanes, words = present.shape
    before = np.zeros((slices, lanes, words + 1), np.int32)
    np.cumsum(present, axis=2, out=before[:, :, 1:])
    lists = np.full((slices, lanes, int(before[:, :, -1].max()) + UNROLL), words, np.int32)
    slice_, lane, word = np.nonzero(present)
    lists[slice_, lane, before[slice_, lane, word]] = word
    return lists, before
