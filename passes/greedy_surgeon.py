"""Optimal Brain Compression: zeros are chosen one block after the other, each the one that loses least once all weights
that are left have made up for it.

For a row ``w`` of a layer whose inputs have the second moments ``G``, with ``H`` the inverse of ``G`` among the columns
that are left, making the columns ``B`` zero loses ``w_B inverse(H_BB) w_B^T``, and then::

    w -= w_B inverse(H_BB) H_B        H -= H_:B inverse(H_BB) H_B:

Each row is taken apart by itself, and it is noted what each of its blocks lost. Then the blocks that lost least go, of
all rows together. Where a row has many blocks several go at a time: nearly as good, and ``H`` is gone over less often.

Sources: Hassibi and Stork, Second Order Derivatives for Network Pruning, 1993; Frantar, Singh and Alistarh, Optimal
Brain Compression (arXiv:2208.11580).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pumice.patterns import Pattern, smallest

_STEPS = 96  # in which a row is taken apart; with more blocks than that several go at a time
_SPARE = 1.3  # a row may lose so many times its share of blocks, where others lose less
_WORTHWHILE = 0.8  # the share of columns left at which smaller inverses are worth the copy
_MEMORY = 1 << 24  # bytes of inverses at a time: about a core's own cache
_DTYPE = np.float32  # of the state: it decides what goes, and what is left is solved for in float64 afterwards


def greedy_zeros(rows: np.ndarray, gram: np.ndarray, pattern: Pattern, amount: float) -> np.ndarray:
    """The zeros of ``rows [N, taps, C]``: bool ``[N, taps * C]``; what is zero stays zero, and counts.

    ``gram``, ``[taps * C, taps * C]``, must be positive definite. Of the pattern's blocks ``round(amount * blocks)``
    are zero; with N:M, N of each M neighbours are left, and amount is not looked at.
    """
    weight = rows.reshape(len(rows), -1).astype(np.float64)
    grid = _Grid.of(rows.shape, pattern)
    inverse = np.linalg.inv(grid.padded_gram(gram / np.mean(np.diagonal(gram))))  # of a size that float32 has
    bands = grid.padded_bands(weight)
    size = max(1, _MEMORY // inverse.nbytes)
    lost = np.concatenate(
        [_take_apart(bands[first : first + size], inverse, grid, amount) for first in range(0, len(bands), size)]
    )
    zero = np.isfinite(lost) if grid.quota is not None else smallest(lost.ravel(), amount).reshape(lost.shape)
    columns = zero.repeat(grid.width, axis=1).repeat(grid.height, axis=0)[: len(weight)]
    found: np.ndarray = weight == 0
    real = grid.columns >= 0
    found[:, grid.columns[real]] |= columns[:, real]
    return found


@dataclass(frozen=True)
class _Grid:
    """The columns in blocks of one width: a short one is filled up with columns of nothing.

    columns: for each column of the grid its place in the weight, or -1
    quota: with N:M how many of each group of ``group`` columns may go
    """

    height: int
    width: int
    columns: np.ndarray
    group: int = 1
    quota: np.ndarray | None = None

    @classmethod
    def of(cls, shape: tuple[int, ...], pattern: Pattern) -> _Grid:
        _, taps, channels = shape
        n, m = pattern.group or (0, 1)
        places = np.arange(taps * channels).reshape(taps, channels)
        columns = np.pad(places, ((0, 0), (0, -channels % (pattern.width * m))), constant_values=-1).ravel()
        if pattern.group is None:
            return cls(pattern.height, pattern.width, columns)
        return cls(1, 1, columns, m, np.maximum((columns.reshape(-1, m) >= 0).sum(1) - n, 0))

    def padded_bands(self, weight: np.ndarray) -> np.ndarray:
        """``[bands, height, columns]``: the rows that share their blocks; a short band has rows of nothing."""
        spread = np.where(self.columns < 0, 0.0, weight[:, self.columns])
        return np.pad(spread, ((0, -len(weight) % self.height), (0, 0))).reshape(-1, self.height, spread.shape[1])

    def padded_gram(self, gram: np.ndarray) -> np.ndarray:
        """Columns of nothing have nothing to do with any other."""
        nothing = self.columns < 0
        return np.where(nothing | nothing[:, None], np.eye(len(nothing)), gram[np.ix_(self.columns, self.columns)])


def _take_apart(bands: np.ndarray, inverse: np.ndarray, grid: _Grid, amount: float) -> np.ndarray:
    """What each block lost when it went, ``[bands, blocks]``; infinity for those that stayed to the end."""
    state = _State(bands, inverse, grid)
    count = state.lost.shape[1]
    several = -(-count // _STEPS)
    if grid.quota is not None:
        while state.remove_least(several):
            pass
        return state.lost
    wanted = int(min(count, _SPARE * amount * count + 1))
    for done in range(0, wanted, several):
        state.remove_least(min(several, wanted - done))
        state.forget_what_is_gone()
    return state.lost


class _State:
    """Bands on their way: the weights and the inverse of each, in which a column that is gone stands for itself."""

    def __init__(self, bands: np.ndarray, inverse: np.ndarray, grid: _Grid) -> None:
        count = bands.shape[2] // grid.width
        self.lost = np.full((len(bands), count), np.inf)
        self._grid = grid
        self._weight = bands.astype(_DTYPE)
        self._inverse = np.repeat(inverse[None].astype(_DTYPE), len(bands), axis=0)
        self._blocks = np.repeat(np.arange(count)[None], len(bands), axis=0)  # that are still looked at
        self._floor = np.zeros((len(bands), 1))
        for band, weight in enumerate(self._weight):
            gone = np.flatnonzero((weight == 0).all(0) & (grid.columns >= 0))
            if len(gone):
                self._eliminate(slice(band, band + 1), gone[None])

    def remove_least(self, count: int) -> bool:
        """Make so many blocks of each band zero, those that lose least; False where no band has one that may go."""
        losses = self._losses()
        chosen = np.argpartition(losses, count - 1, axis=1)[:, :count]
        least = np.take_along_axis(losses, chosen, axis=1)
        possible = np.isfinite(least)
        # A block counts for no less than one that went before it, so that none goes without the other.
        self._floor = np.maximum(self._floor, np.where(possible, least, 0).max(1, keepdims=True))
        blocks = np.take_along_axis(self._blocks, chosen, axis=1)
        known = np.take_along_axis(self.lost, blocks, axis=1)
        np.put_along_axis(self.lost, blocks, np.where(possible, self._floor, known), axis=1)
        if possible.all():
            self._eliminate(slice(None), self._columns(chosen))
            return True
        for band in np.flatnonzero(possible.any(1)):
            self._eliminate(slice(band, band + 1), self._columns(chosen[band : band + 1, possible[band]]))
        return bool(possible.any())

    def forget_what_is_gone(self) -> None:
        """Make the inverses smaller. Every band must have lost the same number of blocks."""
        gone = np.isfinite(np.take_along_axis(self.lost, self._blocks, axis=1))
        left = gone.shape[1] - int(gone[0].sum())
        if left > _WORTHWHILE * gone.shape[1]:
            return
        kept = np.argsort(gone, axis=1, kind="stable")[:, :left]
        columns = self._columns(kept)
        self._blocks = np.take_along_axis(self._blocks, kept, axis=1)
        self._weight = np.take_along_axis(self._weight, columns[:, None, :], axis=2)
        rows = np.take_along_axis(self._inverse, columns[:, :, None], axis=1)
        self._inverse = np.take_along_axis(rows, columns[:, None, :], axis=2)

    def _columns(self, blocks: np.ndarray) -> np.ndarray:
        width = self._grid.width
        return (blocks[..., None] * width + np.arange(width)).reshape(len(blocks), -1)

    def _losses(self) -> np.ndarray:
        """What each block would lose, ``[bands, blocks]``; infinity where it must not go or is gone."""
        bands, blocks = self._blocks.shape
        width = self._grid.width
        squares = self._inverse.reshape(bands, blocks, width, blocks, width)
        at = np.arange(blocks)
        inside = squares[:, at, :, at, :].transpose(1, 0, 2, 3)  # [bands, blocks, width, width]
        weight = self._weight.reshape(bands, -1, blocks, width).transpose(0, 2, 3, 1)
        losses: np.ndarray = (weight * np.linalg.solve(inside, weight)).sum((2, 3))
        gone = np.isfinite(np.take_along_axis(self.lost, self._blocks, axis=1))
        losses[gone] = np.inf
        if self._grid.quota is not None:
            self._keep_to_quota(losses, gone, self._grid.quota)
        return losses

    def _keep_to_quota(self, losses: np.ndarray, gone: np.ndarray, quota: np.ndarray) -> None:
        """At most one of each group at a time, and none of a group that has lost its share."""
        losses[:, self._grid.columns < 0] = np.inf
        grouped = losses.reshape(len(losses), -1, self._grid.group)
        best = grouped.argmin(2)[..., None] == np.arange(self._grid.group)
        spent = gone.reshape(grouped.shape).sum(2) >= quota
        grouped[~best | spent[..., None]] = np.inf

    def _eliminate(self, bands: slice, columns: np.ndarray) -> None:
        """Let the others make up for these columns, ``[bands, count]``, and take them out of the inverse."""
        inverse, weight = self._inverse[bands], self._weight[bands]
        across = np.take_along_axis(inverse, columns[:, None, :], axis=2)  # [bands, columns, count]
        inside = np.take_along_axis(across, columns[:, :, None], axis=1)
        gain = np.linalg.solve(inside, across.transpose(0, 2, 1))  # [bands, count, columns]
        weight -= np.take_along_axis(weight, columns[:, None, :], axis=2) @ gain
        inverse -= across @ gain
        each = np.arange(len(inverse))[:, None]
        inverse[each, columns, :] = 0
        inverse[each, :, columns] = 0
        inverse[each, columns, columns] = 1
        weight[each, :, columns] = 0
