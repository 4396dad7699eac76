"""A layer as its kernel on a GPU takes it: the workload, and its constants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pumice.errors import UnsupportedError
from pumice.schedules.blocks import QUAD, Blocks
from pumice.schedules.cuda.tiling import SHARED_LIMIT, Slab, Tiling, entry_words
from pumice.schedules.epilogue import Epilogue
from pumice.schedules.places import Places


@dataclass(frozen=True)
class CudaLayer:
    """One layer's workload.

    Arguments of the kernel, in order, as for ``Convolution``: x ``[source_rows, P, depth]``; weight ``[blocks, shared,
    depth]``; offsets int32 ``[columns]``; starts int32 (sparse only); bias ``[N]`` int32 or float32; multiplier
    float32 ``[N]`` (int8 only); residual, like the output (if any); mask int32 ``[P]`` (output with padding); output
    ``[N/4, P, 4]`` uint8 or ``[N, P, 1]`` float32. ``offsets`` count from where a tile of the reduction lies in shared
    memory.
    """

    dtype: str  # of the multiplication: int8 or float32
    source_rows: int
    rows: int  # output rows, a multiple of 4
    words: int  # input words that have weights
    places: Places
    blocks: int
    columns: int
    shared: int
    is_dense: bool
    tiles: int  # of the reduction
    capacity: int  # the most blocks that a thread block copies for a tile of the reduction
    tiling: Tiling
    epilogue: Epilogue

    @classmethod
    def of(cls, blocks: Blocks, source_rows: int, places: Places, tiling: Tiling, epilogue: Epilogue) -> CudaLayer:
        """The workload of ``blocks`` that were cut into tiles of ``tiling.words``."""
        return cls(
            dtype=str(blocks.data.dtype),
            source_rows=source_rows,
            rows=blocks.rows,
            words=blocks.words,
            places=places,
            blocks=int(blocks.data.shape[0]),
            columns=len(blocks.columns),
            shared=blocks.shared,
            is_dense=blocks.is_dense,
            tiles=blocks.tiles,
            capacity=_capacity(blocks, tiling),
            tiling=tiling,
            epilogue=epilogue,
        )

    @property
    def depth(self) -> int:
        """Input channels in a word."""
        return 4 if self.dtype == "int8" else 1

    @property
    def quads(self) -> int:
        """Quads of output rows."""
        return self.rows // QUAD

    @property
    def has_one_position(self) -> bool:
        """Whether there is nothing to share a weight: the kernel of ``gemv.py``."""
        return self.places.target.positions == 1 and self.places.source.positions == 1

    @property
    def copies_input(self) -> bool:
        """Whether a thread block copies its part of the input into shared memory."""
        return self.tiling.copies and not self.has_one_position

    @property
    def slab(self) -> Slab:
        """The input's part in shared memory."""
        return Slab.of(self.places, self.tiling.positions if self.copies_input else 0)

    @property
    def taps(self) -> int:
        """Of the window."""
        return len(self.places.window.taps())

    @property
    def tile_columns(self) -> int:
        """Columns in a tile of the reduction."""
        return self.taps * min(self.tiling.words, self.words)

    @property
    def slab_words(self) -> int:
        """32-bit words of shared memory for the input."""
        slab = self.slab
        return min(self.tiling.words, self.words) * slab.phases * slab.pitch if self.copies_input else 0

    @property
    def list_words(self) -> int:
        """32-bit words of shared memory for weights and offsets."""
        if self.is_dense:
            return self.capacity * QUAD + self.tile_columns
        return self.capacity * entry_words(self.shared)

    @property
    def shared_bytes(self) -> int:
        """Of a thread block's shared memory; with one position it takes none."""
        return 0 if self.has_one_position else 4 * (self.slab_words + self.list_words)

    @property
    def fits(self) -> bool:
        """Whether every GPU has so much shared memory."""
        return self.shared_bytes <= SHARED_LIMIT

    def check(self) -> None:
        """Raise UnsupportedError where shared memory is too small for the tiling."""
        if not self.fits:
            raise UnsupportedError(
                f"a layer with {self.rows} output rows and {self.words} input words, in tiles of {self.tiling.words}, "
                f"takes {self.shared_bytes} bytes of a thread block's shared memory, which has {SHARED_LIMIT}; use a "
                "smaller tiling"
            )


def cuda_constants(blocks: Blocks, work: CudaLayer) -> dict[str, np.ndarray]:
    """The kernel's arguments between the input and the bias, by name."""
    constants = {"blocks": blocks.data, "offsets": _offsets(blocks, work)}
    return constants if blocks.starts is None else constants | {"starts": blocks.starts}


def _offsets(blocks: Blocks, work: CudaLayer) -> np.ndarray:
    """For each column, from the block's first position in a tile's first row to the word that it reads."""
    tap, word = np.divmod(blocks.columns.astype(np.int64), blocks.words)
    slab = work.slab
    within = word if work.has_one_position else word % work.tiling.words
    return np.asarray(within * slab.phases * slab.pitch + np.asarray(slab.offsets(work.places))[tap], np.int32)


def _capacity(blocks: Blocks, tiling: Tiling) -> int:
    """The blocks that a thread block copies at once, at most; one of them at least."""
    quads = blocks.rows // QUAD
    if blocks.starts is None:
        return min(tiling.block_quads, quads) * min(blocks.tile_words, blocks.words) * blocks.taps
    lists = blocks.rows // blocks.shared
    first = np.arange(0, lists, tiling.block_quads * QUAD // blocks.shared)
    last = np.append(first[1:], lists)
    tile = np.arange(blocks.tiles)[:, None] * lists
    return max(1, int((blocks.starts[tile + last] - blocks.starts[tile + first]).max()))
