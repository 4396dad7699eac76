"""The kernel of a linear layer or 1x1 convolution on sparse tensor cores: two of four weights, ``mma.sp``, sm_80 and up.

A warp has 32 output rows and all positions of its thread block. The block's threads copy a tile of the input into
shared memory, where a warp finds the word of each lane without bank conflicts; weights come from memory as the lanes
want them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD
from pumice.schedules.cuda.output import Output, barrier, local
from pumice.schedules.cuda.tiling import WARP
from pumice.schedules.cuda.two_of_four import GROUP, STEP, TwoOfFour
from pumice.schedules.emit import Expr
from pumice.schedules.epilogue import Epilogue
from pumice.schedules.geometry import LANES
from pumice.schedules.places import Places

_COLUMNS = 8  # positions of an instruction
_STEP_WORDS = STEP // 4


@dataclass(frozen=True)
class MmaLayer:
    """One layer's workload. Each of the ``warps`` of a thread block has 32 output rows, at ``8 * columns`` positions.

    Arguments of the kernel, in order: x uint8 ``[source_rows, P, 4]``; weight and metadata as in ``TwoOfFour``; bias
    int32 ``[N]``; multiplier float32 ``[N]``; residual, like the output (if any); mask int32 ``[P]`` (output with
    padding); output ``[N/4, P, 4]`` uint8 or ``[N, P, 1]`` float32.
    """

    source_rows: int
    rows: int  # output rows, a multiple of 4
    words: int  # input words that have weights
    places: Places
    epilogue: Epilogue
    warps: int = 4
    columns: int = 8
    steps: int = 2  # instructions along the reduction in a tile of it
    dtype: str = "int8"

    @property
    def quads(self) -> int:
        """Quads of output rows."""
        return self.rows // QUAD

    @property
    def positions(self) -> int:
        """Positions of a thread block."""
        return _COLUMNS * self.columns

    @property
    def groups(self) -> int:
        """Groups of output rows: warps that have work."""
        return -(-self.rows // GROUP)

    @property
    def all_steps(self) -> int:
        """Instructions along the whole reduction."""
        return -(-self.words // _STEP_WORDS)

    @property
    def pitch(self) -> int:
        """Positions from a row of the copy to the next: 8 or 24 modulo 32, so that four rows lie in different banks."""
        return self.positions if self.positions % 16 else self.positions + 8


def mma_layer(work: MmaLayer, name: str = "layer") -> tirx.PrimFunc:
    """The PrimFunc of ``work``, for ``targets/cuda_source.py``."""
    return emit.kernel(name, _Emitter(work).emit)


def mma_constants(weight: TwoOfFour) -> dict[str, np.ndarray]:
    """The kernel's arguments between the input and the bias, by name."""
    return {"blocks": weight.data, "metadata": weight.metadata}


class _Emitter:
    def __init__(self, work: MmaLayer) -> None:
        self.work, target = work, work.places.target
        self.position_tiles = -(-target.span // work.positions)
        self.tiles = -(-work.all_steps // work.steps)
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
            self.tile, self.lane, self.warp = tile, lane, warp
            # A warp without rows multiplies those of the last, for all must come to the barriers, and stores nothing.
            self.group = tirx.min(block * work.warps + warp, work.groups - 1)
            self.has_rows = block * work.warps + warp < work.groups
            self.position = work.places.target.base + tile * work.positions
            self.input = T.alloc_buffer((work.steps * _STEP_WORDS * work.pitch,), "int32", scope="shared")
            self.acc = local("int32", 2 * work.columns * 4)
            self._start()
            with emit.loop(self.tiles) as step:
                self._copy_input(step)
                barrier()
                self._multiply(step)
                if self.tiles > 1:
                    barrier()
            self._finish()

    def _declare(self) -> None:
        work = self.work
        x = emit.argument("x", (work.source_rows, work.places.source.positions, 4), "uint8")
        shape = (work.groups, work.all_steps, 2, WARP)
        weight = emit.argument("weight", (*shape, 16), "int8")
        metadata = emit.argument("metadata", shape, "int32")
        self.output = Output(work)
        self.x, self.weight, self.metadata = emit.words_of(x), emit.words_of(weight), emit.words_of(metadata)

    def _start(self) -> None:
        """Registers of an instruction: two positions of the lower row, two of the upper."""
        with T.unroll(0, 2) as half, T.unroll(0, self.work.columns) as column, T.unroll(0, 4) as i:
            row = tirx.min(self._quad(), self.work.quads - 1) * QUAD + half * 2 + i // 2
            T.buffer_store(self.acc, self.output.bias[row], [self._register(half, column) + i])

    def _copy_input(self, tile: Expr) -> None:
        """A warp for each row; zeros beyond the last row, whose weights are zero, and beyond the plane."""
        work, source = self.work, self.work.places.source
        count, first = work.steps * _STEP_WORDS, self.position + source.base - work.places.target.base
        with T.serial(0, -(-count // work.warps)) as i, T.unroll(0, -(-work.positions // WARP)) as part:
            row, place = i * work.warps + self.warp, part * WARP + self.lane
            word = tile * count + row
            with T.If(tirx.all(row < count, place < work.positions)), T.Then():
                with T.If(tirx.all(word < work.words, first + place < source.positions)):
                    with T.Then():
                        value = self.x[word * source.positions + first + place]
                        T.buffer_store(self.input, value, [row * work.pitch + place])
                    with T.Else():
                        T.buffer_store(self.input, 0, [row * work.pitch + place])

    def _multiply(self, tile: Expr) -> None:
        work = self.work
        a, b = local("int32", 4), local("int32", 4)
        with T.serial(0, work.steps) as step:
            now = tile * work.steps + step
            with T.If(now < work.all_steps), T.Then(), T.unroll(0, 2) as half:
                place = ((self.group * work.all_steps + now) * 2 + half) * WARP + self.lane
                emit.store(a, 0, emit.load(self.weight, place * 4, 4), 4)
                with T.unroll(0, work.columns) as column:
                    with T.unroll(0, 4) as i:
                        row = step * _STEP_WORDS + i * 4 + self.lane % 4
                        word = self.input[row * work.pitch + column * _COLUMNS + self.lane // 4]
                        T.buffer_store(b, word, [i])
                    pointers = [tirx.address_of(p) for p in (self.acc[self._register(half, column)], a[0], b[0])]
                    T.evaluate(tirx.call_extern("void", "pumice_mma_sp", *pointers, self.metadata[place]))

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
