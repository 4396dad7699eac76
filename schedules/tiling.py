"""How a kernel with many positions walks its work: the search space, every point of which gives the same numbers.

for each tile of positions (``vectors`` vectors, held in registers)
  for each group of output rows (``rows``)
    for each tile of the reduction (``words`` input words: what it reads stays in the L1 cache)
      for each list of blocks of the group, one for every ``shared`` rows
        for each block of the list that lies in the tile
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pumice.schedules.blocks import QUAD
from pumice.schedules.places import Places
from pumice.targets.isa import Isa

L1_SIZE = 48 * 1024  # bytes
_TOUCHED = L1_SIZE * 2 // 3  # of activations, by a tile of the reduction that is cut to fit
_WAITING_ROWS = 512  # whose accumulators may wait in the L2 cache between tiles of the reduction
_WIDE_TOUCHED = (16 * 1024, 24 * 1024, 32 * 1024, 48 * 1024)  # the same two, as the wide space has them
_WIDE_WAITING_ROWS = (128, 512)
_WIDTHS = (2, 3, 4, 5, 6, 8, 12)
_IMBALANCE = 1.05  # of the busiest thread's work, over the mean


@dataclass(frozen=True)
class Form:
    """How a weight is kept: all of it, or the blocks that ``shared`` output rows have between them."""

    shared: int
    is_dense: bool = False

    def describe(self, depth: int) -> str:
        """``dense``, ``sparse 1x4``."""
        return "dense" if self.is_dense else f"sparse {self.shared}x{depth}"


DENSE = Form(QUAD, is_dense=True)
FORMS = (DENSE, Form(1), Form(2), Form(4))


@dataclass(frozen=True)
class Tiling:
    """One way to walk.

    vectors: vectors of positions in registers
    words: input words in a tile of the reduction
    rows: output rows in a group, a multiple of 4. Between two tiles of the reduction a group's accumulators wait in
        memory, ``rows * vectors`` vectors; groups are also what threads share out.
    """

    vectors: int
    words: int
    rows: int


# A form and the way to walk it; in slices, for few positions (``schedules/gemv.py``), there is only one way: None.
Candidate = tuple[Form, Tiling | None]


@dataclass(frozen=True)
class Extent:
    """The size of a layer, as far as a kernel's time depends on it.

    rows: output rows, a multiple of 4
    words: input words; taps: of the kernel
    vectors: vectors of positions
    halo: vectors that a word's taps touch beyond those of one tap
    unaligned: share of the taps whose vectors cross cache lines
    line: bytes in a vector
    """

    rows: int
    words: int
    taps: int
    vectors: int
    halo: int
    unaligned: float
    line: int

    @classmethod
    def of(cls, rows: np.ndarray, places: Places, isa: Isa) -> Extent:
        """The extent of a layer with weight ``rows`` ``[N, taps, C]``."""
        depth = 4 if rows.dtype == np.int8 else 1
        n, taps, c = rows.shape
        return cls(
            rows=-(-n // QUAD) * QUAD,
            words=-(-c // depth),
            taps=taps,
            vectors=places.vectors(isa.lanes),
            halo=places.halo(isa.lanes),
            unaligned=float(np.mean(places.shifts % isa.lanes != 0)),
            line=4 * isa.lanes,
        )

    def touched(self, tiling: Tiling) -> int:
        """Bytes of activations that one tile of the reduction touches."""
        return min(tiling.words, self.words) * (tiling.vectors + self.halo) * self.line


def tilings(extent: Extent, form: Form, isa: Isa, threads: int, wide: bool = False) -> list[Tiling]:
    """The candidates for a form: some widths, with the reduction whole and, where that is too much for L1, cut.

    Two widths and one cut are what the cost table chooses between; ``wide`` is for those who measure.
    """
    found = []
    for widest in _widths(form, isa, wide):
        width = -(-extent.vectors // -(-extent.vectors // widest))
        for longest, cuts in _cuts(extent, width, wide):
            rows = _balanced(extent, width, longest, threads)
            found.append(Tiling(width, -(-extent.words // cuts), rows))
    return list(dict.fromkeys(found))


def _widths(form: Form, isa: Isa, wide: bool) -> tuple[int, ...]:
    """Vectors in a tile; three quarters of the registers hold accumulators at most."""
    if wide:
        return tuple(width for width in _WIDTHS if width * form.shared <= isa.registers * 3 // 4)
    return (isa.registers // 4 if form.shared == 1 else isa.registers * 3 // 16, isa.registers // 8)


def _cuts(extent: Extent, width: int, wide: bool) -> list[tuple[int, int]]:
    """How long a group of rows may be, and into how many tiles the reduction is cut."""
    found = [(extent.rows, 1)]
    for touched in _WIDE_TOUCHED if wide else (_TOUCHED,):
        cuts = -(-extent.words // max(1, touched // ((width + extent.halo) * extent.line)))
        for longest in _WIDE_WAITING_ROWS if wide else (_WAITING_ROWS,):
            found += [(min(extent.rows, longest), cuts)] if cuts > 1 else []
    return found


def _balanced(extent: Extent, width: int, longest: int, threads: int) -> int:
    """The largest group of rows, up to ``longest``, with which threads finish together."""
    tiles, quads = -(-extent.vectors // width), extent.rows // QUAD
    best, least = longest, float("inf")
    for groups in range(-(-extent.rows // longest), min(quads, 4 * threads) + 1):
        units = tiles * groups
        imbalance = -(-units // threads) * threads / units
        if imbalance < least:
            best, least = QUAD * -(-quads // groups), imbalance
        if imbalance <= _IMBALANCE:
            break
    return best
