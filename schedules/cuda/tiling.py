"""How a kernel on a GPU shares out its work: the search space, every point of which gives the same numbers.

for each tile of ``32 * vectors`` positions and each group of ``warps * quads`` quads of output rows: a thread block
  for each tile of the reduction (``words`` input words): all threads copy it into shared memory
    each warp: its ``quads``, one after the other, or side by side if dense
      each thread: 4 rows x ``vectors`` positions, in registers
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pumice.schedules.blocks import QUAD, Blocks
from pumice.schedules.places import Places

WARP = 32  # threads that run in step
SHARED_LIMIT = 48 * 1024  # bytes of shared memory that every GPU gives a block unasked


@dataclass(frozen=True)
class Tiling:
    """One way to share out.

    warps: of a block, each with rows of its own
    quads: of output rows that a warp computes
    vectors: positions of a thread, 32 apart
    words: input words in a tile of the reduction
    copies: whether the input is copied into shared memory; if not, it is read where it is
    """

    warps: int
    quads: int
    vectors: int
    words: int
    copies: bool = True

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.warps

    @property
    def positions(self) -> int:
        """Positions of a block."""
        return WARP * self.vectors

    @property
    def block_quads(self) -> int:
        """Quads of output rows of a block."""
        return self.warps * self.quads


@dataclass(frozen=True)
class Slab:
    """What a tile of the reduction keeps of the input in shared memory: a row for each channel word and stride phase.

    lowest: the leftmost position that a tap reads, from that of the output; pitch: positions from a row to the next
    """

    phases: int
    lowest: int
    pitch: int

    @classmethod
    def of(cls, places: Places, positions: int) -> Slab:
        """For blocks of so many positions; without copies (``positions`` 0) rows are those of the input plane."""
        shifts = [shift for _, shift in _taps(places)]
        phases = len(places.window.phases())
        if positions == 0:
            return cls(phases, 0, places.source.positions)
        return cls(phases, min(shifts), positions + max(shifts) - min(shifts))

    def offsets(self, places: Places) -> list[int]:
        """How far each tap of a word reads from the word's first row, at the block's first position."""
        return [phase * self.pitch + shift - self.lowest for phase, shift in _taps(places)]


def _taps(places: Places) -> list[tuple[int, int]]:
    """Stride phase and shift of each tap."""
    phases, base = places.window.phases(), places.source.base - places.target.base
    pitch = places.source.pitch
    return [(phases.index(phase), base + shift[0] * pitch + shift[1]) for phase, shift in places.window.taps()]


def entry_words(shared: int) -> int:
    """32-bit words of a block of a list in shared memory: ``shared`` of weights, an offset, what alignment takes."""
    return {1: 2, 2: 4, 4: 8}[shared]


def tilings(blocks: Blocks, places: Places) -> list[Tiling]:
    """Candidates for untiled ``blocks``, the likeliest first: enough thread blocks, and as much reuse as they leave."""
    quads = blocks.rows // QUAD
    wanted = -(-places.target.span // WARP)
    found = []
    for vectors in (4, 2, 1):
        if vectors > 1 and vectors >= 2 * wanted:
            continue
        tiles = -(-wanted // vectors)
        for warps, each in ((8, 2), (8, 1), (4, 1), (2, 1)):
            if warps * each >= 2 * quads and warps > 2:
                continue
            enough = tiles * -(-quads // (warps * each)) >= FULL
            found.append((not enough, _with_words(blocks, places, Tiling(warps, each, vectors, 1))))
    return [tiling for _, tiling in sorted(found, key=lambda item: item[0])] + [_without_copies(blocks, places)]


def _without_copies(blocks: Blocks, places: Places) -> Tiling:
    """For taps so far apart that shared memory does not hold what lies between."""
    return _with_words(blocks, places, Tiling(2, 1, 4, 1, copies=False))


def _with_words(blocks: Blocks, places: Places, tiling: Tiling) -> Tiling:
    """The longest tile of the reduction that leaves room for another thread block beside this one."""
    if places.source.positions == places.target.positions == 1:  # nothing is kept in shared memory
        return replace(tiling, words=blocks.words)
    slab = Slab.of(places, tiling.positions)
    share = blocks.work / max(1, blocks.rows * blocks.taps * blocks.words)
    share = 1.0 if blocks.is_dense else min(1.0, _UNEVEN * share)
    entry = QUAD if blocks.is_dense else entry_words(blocks.shared) * QUAD // blocks.shared
    for_word = share * blocks.taps * tiling.block_quads * entry + (slab.phases * slab.pitch if tiling.copies else 1)
    words = max(1, min(blocks.words, _LONGEST, int(_ROOM / 4 / for_word)))
    return replace(tiling, words=-(-blocks.words // -(-blocks.words // words)))


FULL = 128  # thread blocks that keep most GPUs busy
_LONGEST = 64
_ROOM = 24 * 1024  # bytes of shared memory
_UNEVEN = 1.5  # times the mean, the longest lists of a tile
