"""A weight of which two of every four neighbouring inputs are left, as ``mma.sp`` takes it.

The instruction multiplies 16 rows of 64 inputs, of which 32 are kept, by 64 inputs of 8 positions. Which thread of a
warp holds what is the layout of m16n8k64 in the PTX ISA, "Matrix fragments for multiply-accumulate operation with
sparse matrix A"; the order of metadata is that of CUTLASS (``reorder_meta``). With ``g = lane / 4``, ``t = lane % 4``:

    weights   register i: row g + 8 (i % 2), kept inputs 16 (i / 2) + 4 t and the three after
    metadata  row g + 8 (t % 2), inputs 32 (t / 2) to 32 (t / 2) + 31: for each four of them 2 + 2 bits, lowest first
    inputs    register i: inputs 16 i + 4 t and the three after, position g: a word of the packed form

Rows are free in their order. Two instructions give a thread four rows at a position, and they become one quad.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pumice.schedules.places import Places

STEP = 64  # inputs of an instruction
GROUP = 32  # output rows of two
LANES = 32
_CHOSEN = np.array([[i, j] for i in range(4) for j in range(i + 1, 4)])  # two of four


@dataclass(frozen=True)
class TwoOfFour:
    """Weights and metadata by lane.

    data: int8 ``[groups, steps, 2, 32, 16]``: the four registers of each lane for each instruction
    metadata: int32 ``[groups, steps, 2, 32]``
    words: input words that have weights; rows: output rows, a multiple of 4
    """

    data: np.ndarray
    metadata: np.ndarray
    words: int
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.data.nbytes + self.metadata.nbytes


def why_not_two_of_four(rows: np.ndarray, places: Places) -> str | None:
    """Why ``mma.sp`` cannot multiply a layer with weight ``rows`` ``[N, taps, C]``; None if it can."""
    if rows.dtype != np.int8:
        return "its weight is not int8"
    if places.window.kernel != (1, 1) or places.window.stride != (1, 1):
        return "its kernel is not 1 x 1 with stride 1"
    fours = np.pad(rows[:, 0], ((0, 0), (0, -rows.shape[2] % 4))).reshape(len(rows), -1, 4)
    crowded = np.argwhere(np.count_nonzero(fours, axis=2) > 2)
    if len(crowded):
        row, four = crowded[0]
        return f"{len(crowded)} of its groups of four inputs have more than two weights, the first at [{row}, {4 * four}]"
    return None


def two_of_four(rows: np.ndarray) -> TwoOfFour:
    """``rows`` ``[N, 1, C]``, of which ``why_not_two_of_four`` says nothing."""
    n, _, c = rows.shape
    padded = np.pad(rows[:, 0], ((0, -n % GROUP), (0, -c % STEP)))
    fours = padded.reshape(-1, padded.shape[1] // 4, 4)
    # The first of the six choices that has all weights.
    held = np.stack([np.count_nonzero(fours[:, :, pair], axis=2) for pair in _CHOSEN])
    chosen = _CHOSEN[held.argmax(axis=0)]
    kept = np.take_along_axis(fours, chosen, axis=2)
    groups, steps = len(padded) // GROUP, padded.shape[1] // STEP
    # Output row 4 g + r of a group is row g + 8 (r % 2) of instruction r / 2.
    by_row = kept.reshape(groups, 8, 2, 2, steps, 2, 4, 4)  # group, g, instruction, upper, step, half, t, input
    data = by_row.transpose(0, 4, 2, 1, 6, 5, 3, 7).reshape(groups, steps, 2, LANES, 16)
    bits = (chosen[..., 0] | chosen[..., 1] << 2).astype(np.uint32) << (4 * (np.arange(fours.shape[1]) % 8)).astype(
        np.uint32
    )
    words = np.bitwise_or.reduce(bits.reshape(groups, 8, 2, 2, steps, 2, 8), axis=-1)
    metadata = words.transpose(0, 4, 2, 1, 5, 3).reshape(groups, steps, 2, LANES)
    return TwoOfFour(np.ascontiguousarray(data), np.ascontiguousarray(metadata).view(np.int32), -(-c // 4), -(-n // 4) * 4)
