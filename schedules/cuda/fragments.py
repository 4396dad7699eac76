"""A weight as tensor cores take it: dense, or two of every four neighbouring inputs.

An instruction multiplies 16 rows of 32 inputs (``mma``), or of 64 inputs of which 32 are kept (``mma.sp``), by the
inputs of 8 positions. Which thread of a warp holds what is the layout of m16n8k32 and of sparse m16n8k64 in the PTX
ISA. With ``g = lane / 4``, ``t = lane % 4``:

    weights   register i: row g + 8 (i % 2), kept inputs 16 (i / 2) + 4 t and the three after
    metadata  row g + 8 (t % 2), inputs 32 (t / 2) to 32 (t / 2) + 31: for each four of them 2 + 2 bits, lowest first
    inputs    register i: inputs 16 i + 4 t and the three after, position g: a word of the packed form

The metadata of all lanes are used (sparsity selector 0). The PTX ISA only draws their layout ("Sparse MMA .m16n8k64
metadata layout for columns 0-31", and "32-63", for all 8-bit types). In words and code it is found in

- github.com/NVIDIA/cutlass, include/cute/atom/mma_traits_sm120_sparse.hpp: ``ELayout`` of ``SM120_SPARSE_16x8x64_TN``;
  the order of the bits in tools/util/include/cutlass/util/host_uncompress.h
- github.com/noheat61/triton, DOT_SPARSE_INTERNALS.md, section 4: measured with int8 on sm_89, and read off the figures
- github.com/NVlabs/cuda-oxide, example sparse_mma_fp8: weights, inputs and the order of the bits, measured with fp8

Four inputs are a word of the packed form, so that a convolution's columns (word after word, the taps of a word side by
side) are inputs like any. Rows are free in their order: two instructions give a thread the four rows of a quad.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP = 32  # output rows of two instructions
_LANES = 32
_PAIRS = np.array([[i, j] for i in range(4) for j in range(i + 1, 4)])  # two of four


@dataclass(frozen=True)
class Fragments:
    """Weights by lane, in tiles of the reduction, each padded with zeros to whole instructions.

    data: int8 ``[groups, tiles, steps, 2, 32, 16]``: the four registers of each lane for each instruction
    metadata: int32 ``[groups, tiles, steps, 2, 32]``; None if dense
    """

    data: np.ndarray
    metadata: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.data.nbytes + (0 if self.metadata is None else self.metadata.nbytes)


def columns_of_step(is_sparse: bool) -> int:
    """Columns, of four inputs each, that an instruction takes."""
    return 16 if is_sparse else 8


def why_not_two_of_four(rows: np.ndarray) -> str | None:
    """Why a weight ``[N, taps, C]`` cannot be kept as two of four; None if it can."""
    if rows.dtype != np.int8:
        return "its weight is not int8"
    n, taps, c = rows.shape
    fours = np.pad(rows, ((0, 0), (0, 0), (0, -c % 4))).reshape(n, taps, -1, 4)
    crowded = int((np.count_nonzero(fours, axis=3) > 2).sum())
    if crowded:
        return f"{crowded} of its {fours[..., 0].size} groups of four inputs have more than two weights"
    return None


def fragments(rows: np.ndarray, is_sparse: bool, tile_words: int) -> Fragments:
    """An int8 weight ``[N, taps, C]`` in tiles of ``tile_words`` input words.

    If ``is_sparse``, it must be one of which ``why_not_two_of_four`` says nothing.
    """
    n, taps, c = rows.shape
    tiles, each = -(-c // (4 * tile_words)), columns_of_step(is_sparse)
    steps = -(-tile_words * taps // each)
    padded = np.pad(rows, ((0, -n % GROUP), (0, 0), (0, tiles * tile_words * 4 - c)))
    groups = len(padded) // GROUP
    columns = padded.reshape(-1, taps, tiles, tile_words, 4).transpose(0, 2, 3, 1, 4)
    columns = columns.reshape(-1, tiles, tile_words * taps, 4)
    columns = np.pad(columns, ((0, 0), (0, 0), (0, steps * each - tile_words * taps), (0, 0)))
    metadata = None
    if is_sparse:
        columns, places = _kept(columns)
        # Of a group's row 4 g + r, r / 2 is the instruction and r % 2 the upper eight of its rows.
        by_half = places.reshape(groups, 8, 2, 2, tiles, steps, 2, 8)
        halves = np.bitwise_or.reduce(by_half << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
        metadata = halves.transpose(0, 4, 5, 2, 1, 6, 3).reshape(groups, tiles, steps, 2, _LANES)
        metadata = np.ascontiguousarray(metadata).view(np.int32)
    by_half = columns.reshape(groups, 8, 2, 2, tiles, steps, 2, 4, 4)
    data = by_half.transpose(0, 4, 5, 2, 1, 7, 6, 3, 8).reshape(groups, tiles, steps, 2, _LANES, 16)
    return Fragments(np.ascontiguousarray(data), metadata)


def _kept(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two of the four inputs of each column, all weights among them; and which, the lower place in the lower bits."""
    holds = np.stack([np.count_nonzero(columns[..., pair], axis=-1) for pair in _PAIRS])
    chosen = _PAIRS[holds.argmax(axis=0)]
    return np.take_along_axis(columns, chosen, axis=-1), (chosen[..., 0] | chosen[..., 1] << 2).astype(np.uint32)
