"""The kernel of a layer on tensor cores, from sm_80 on: dense int8 by ``mma``, two of four weights by ``mma.sp``.

A warp has 32 output rows and all positions of its thread block. The block's threads copy a tile of the input into
shared memory, where a lane finds its word of a column by the column's offset; weights come from memory as the lanes
want them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD
from pumice.schedules.cuda.fragments import GROUP, columns_of_step, fragments, why_not_two_of_four
from pumice.schedules.cuda.output import Output, barrier, local
from pumice.schedules.cuda.staging import InputTile
from pumice.schedules.cuda.tiling import FULL, WARP, Slab
from pumice.schedules.emit import Expr
from pumice.schedules.epilogue import Epilogue
from pumice.schedules.geometry import LANES
from pumice.schedules.places import Places

_COLUMNS = 8  # positions of an instruction


@dataclass(frozen=True)
class MmaLayer:
    """One layer's workload. Each of the ``warps`` of a thread block has 32 output rows, at ``8 * columns`` positions.

    Arguments of the kernel, in order: x uint8 ``[source_rows, P, 4]``; weight and metadata (two of four only) as in
    ``Fragments``; offsets int32 ``[columns of a tile]``; bias int32 ``[N]``; multiplier float32 ``[N]``; residual, like
    the output (if any); mask int32 ``[P]`` (output with padding); output ``[N/4, P, 4]`` uint8 or ``[N, P, 1]``
    float32.
    """

    source_rows: int
    rows: int  # output rows, a multiple of 4
    words: int  # input words that have weights
    places: Places
    epilogue: Epilogue
    is_sparse: bool
    tile_words: int  # input words in a tile of the reduction
    warps: int = 4
    columns: int = 8
    dtype: str = "int8"

    @property
    def quads(self) -> int:
        """Quads of output rows."""
        return self.rows // QUAD

    @property
    def groups(self) -> int:
        """Groups of output rows: warps that have work."""
        return -(-self.rows // GROUP)

    @property
    def tiles(self) -> int:
        """Of the reduction."""
        return -(-self.words // self.tile_words)

    @property
    def steps(self) -> int:
        """Instructions along a tile of the reduction."""
        return -(-self.tile_words * len(self.places.window.taps()) // columns_of_step(self.is_sparse))

    @property
    def products(self) -> int:
        """Words of weights that are multiplied for each position, padding included."""
        return self.groups * GROUP * self.tiles * self.steps * columns_of_step(self.is_sparse)

    @property
    def positions(self) -> int:
        """Positions of a thread block."""
        return _COLUMNS * self.columns

    @property
    def slab(self) -> Slab:
        """The input's part in shared memory: neighbouring rows start 8 or 24 banks apart, lest four lanes want one."""
        slab = Slab.of(self.places, self.positions)
        return replace(slab, pitch=slab.pitch + (8 - slab.pitch) % 16)

    @property
    def slab_words(self) -> int:
        """32-bit words of shared memory for the input."""
        return self.tile_words * self.slab.phases * self.slab.pitch


def on_tensor_cores(rows: np.ndarray, source_rows: int, places: Places, epilogue: Epilogue) -> MmaLayer | None:
    """A layer with int8 weight ``rows`` ``[N, taps, C]``: by ``mma.sp`` where two of four weights are left, else dense.

    None where taps lie too far apart.
    """
    n, words, is_sparse = len(rows), -(-rows.shape[2] // 4), why_not_two_of_four(rows) is None
    warps, columns = _sizes(n, places.target.span)
    tile_words = mma_words(words, places, is_sparse, columns)
    if tile_words is None:
        return None
    padded = -(-n // QUAD) * QUAD
    return MmaLayer(source_rows, padded, words, places, epilogue, is_sparse, tile_words, warps, columns)


def _sizes(rows: int, span: int) -> tuple[int, int]:
    """Warps of a thread block and its positions by 8: the largest with which there are enough thread blocks."""
    sizes = [(warps, columns) for columns in (8, 4, 2) for warps in (4, 2, 1)]
    blocks = [-(-rows // (GROUP * warps)) * -(-span // (_COLUMNS * columns)) for warps, columns in sizes]
    return next((size for size, count in zip(sizes, blocks, strict=True) if count >= FULL), sizes[-1])


def mma_words(words: int, places: Places, is_sparse: bool, columns: int = 8) -> int | None:
    """Input words in a tile of the reduction: few of its instructions' columns empty, and room in shared memory.

    None where taps lie so far apart that shared memory does not hold what is between.
    """
    taps, each = len(places.window.taps()), columns_of_step(is_sparse)
    slab = Slab.of(places, _COLUMNS * columns)
    most = min(words, _ROOM // (4 * slab.phases * (slab.pitch + 16)), _LONGEST)

    def padded(tile: int) -> int:
        return -(-words // tile) * -(-tile * taps // each)

    return min(range(1, most + 1), key=lambda tile: (padded(tile), -tile), default=None)


def mma_layer(work: MmaLayer, name: str = "layer") -> tirx.PrimFunc:
    """The PrimFunc of ``work``, for ``targets/cuda_source.py``."""
    return emit.kernel(name, _Emitter(work).emit)


def mma_constants(rows: np.ndarray, work: MmaLayer) -> dict[str, np.ndarray]:
    """The kernel's arguments between the input and the bias, by name, for the weight ``rows`` ``[N, taps, C]``."""
    weight = fragments(rows, work.is_sparse, work.tile_words)
    slab = work.slab
    words = np.arange(work.tile_words)[:, None] * slab.phases * slab.pitch
    offsets = (words + np.asarray(slab.offsets(work.places))).ravel()
    missing = work.steps * columns_of_step(work.is_sparse) - len(offsets)
    constants = {"blocks": weight.data} | ({} if weight.metadata is None else {"metadata": weight.metadata})
    return constants | {"offsets": np.pad(offsets, (0, missing)).astype(np.int32)}


class _Emitter:
    def __init__(self, work: MmaLayer) -> None:
        self.work, target = work, work.places.target
        self.registers = 4 if work.is_sparse else 2  # of inputs, for an instruction
        self.position_tiles = -(-target.span // work.positions)
        self.end = target.base + -(-target.span // LANES) * LANES

    def emit(self) -> None:
        work = self.work
        self._declare()
        with (
            T.launch_thread("blockIdx.x", -(-work.groups // work.warps)) as block,
            T.launch_thread("blockIdx.y", self.position_tiles) as tile,
            T.launch_thread("threadIdx.x", WARP) as lane,
            T.launch_thread("threadIdx.y", work.warps) as warp,
        ):
            self.tile, self.lane = tile, lane
            # A warp without rows multiplies those of the last, for all must come to the barriers, and stores nothing.
            self.group = tirx.min(block * work.warps + warp, work.groups - 1)
            self.has_rows = block * work.warps + warp < work.groups
            self.position = work.places.target.base + tile * work.positions
            self.input = T.alloc_buffer((work.slab_words,), "int32", scope="shared")
            self.acc = local("int32", 2 * work.columns * 4)
            self._start()
            phases = work.slab.phases
            copied = InputTile(work.places.source, work.slab, work.words * phases, work.tile_words * phases)
            with emit.loop(work.tiles) as part:
                copied.copy(self.x, self.input, part, self.position, warp, lane, work.warps)
                barrier()
                with T.serial(0, work.steps) as step:
                    self._multiply(part, step)
                if work.tiles > 1:
                    barrier()
            self._finish()

    def _declare(self) -> None:
        work = self.work
        x = emit.argument("x", (work.source_rows, work.places.source.positions, 4), "uint8")
        shape = (work.groups, work.tiles, work.steps, 2, WARP)
        weight = emit.argument("weight", (*shape, 16), "int8")
        metadata = emit.argument("metadata", shape, "int32") if work.is_sparse else None
        self.offset = emit.argument("offset", (work.steps * columns_of_step(work.is_sparse),), "int32")
        self.output = Output(work)
        self.x, self.weight = emit.words_of(x), emit.words_of(weight)
        self.metadata = None if metadata is None else emit.words_of(metadata)

    def _start(self) -> None:
        """Registers of an instruction: two positions of the lower row, two of the upper."""
        with T.unroll(0, 2) as half, T.unroll(0, self.work.columns) as column, T.unroll(0, 4) as i:
            row = tirx.min(self._quad(), self.work.quads - 1) * QUAD + half * 2 + i // 2
            T.buffer_store(self.acc, self.output.bias[row], [self._register(half, column) + i])

    def _multiply(self, part: Expr, step: Expr) -> None:
        """For 32 rows and all positions of the thread block: the inputs serve two instructions."""
        work, each = self.work, columns_of_step(self.work.is_sparse)
        a, b, offsets = local("int32", 8), local("int32", self.registers), local("int32", self.registers)
        first = ((self.group * work.tiles + part) * work.steps + step) * 2 * WARP + self.lane
        with T.unroll(0, 2) as half:
            emit.store(a, half * 4, emit.load(self.weight, (first + half * WARP) * 4, 4), 4)
        with T.unroll(0, self.registers) as i:
            T.buffer_store(offsets, self.offset[step * each + i * 4 + self.lane % 4] + self.lane // 4, [i])
        with T.unroll(0, work.columns) as column:
            with T.unroll(0, self.registers) as i:
                T.buffer_store(b, self.input[offsets[i] + column * _COLUMNS], [i])
            with T.unroll(0, 2) as half:
                pointers = [tirx.address_of(p) for p in (self.acc[self._register(half, column)], a[half * 4], b[0])]
                if self.metadata is None:
                    T.evaluate(tirx.call_extern("void", "pumice_mma", *pointers))
                else:
                    metadata = self.metadata[first + half * WARP]
                    T.evaluate(tirx.call_extern("void", "pumice_mma_sp", *pointers, metadata))

    def _finish(self) -> None:
        work, target, quad = self.work, self.work.places.target, self._quad()
        with T.If(tirx.all(self.has_rows, quad < work.quads)), T.Then():
            with T.unroll(0, work.columns) as column, T.unroll(0, 2) as odd:
                position = self.position + column * _COLUMNS + self.lane % 4 * 2 + odd
                with T.If(position < self.end), T.Then():
                    self.output.store(
                        quad, position, lambda row: self.acc[self._register(row // 2, column) + row % 2 * 2 + odd]
                    )
            if target.is_padded:
                for tile, first, end in ((0, 0, target.base), (self.position_tiles - 1, self.end, target.positions)):
                    with T.If(self.tile == tile), T.Then():
                        self.output.fill(quad, first, end, self.lane % 4, 4)

    def _quad(self) -> Expr:
        """The lane's quad of output rows."""
        return self.group * (GROUP // QUAD) + self.lane // 4

    def _register(self, half: Expr | int, column: Expr | int) -> Expr:
        return (half * self.work.columns + column) * 4


_LONGEST = 64
_ROOM = 24 * 1024  # bytes of shared memory
