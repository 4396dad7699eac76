"""The kernel of every layer with many positions: linear, 1x1 and k x k convolution, grouped, depthwise.

    Y[n, p] = epilogue(bias[n] + sum over j of W[j] . X[offset[j] + p])

``j`` runs over the blocks of output row ``n`` that are there; only the precomputed offsets know about kernel
positions. A tile holds ``vectors`` vectors of positions for ``shared`` output rows in registers; four output rows
requantize into one packed word. Sparse and dense, int8 and float32 are the same code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD, Blocks
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.epilogue import Epilogue, centred_residual, finish
from pumice.schedules.geometry import Geometry, Window
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Convolution:
    """One layer's workload. The input plane and the output have the same pitch.

    Arguments of the kernel, in order: x ``[source_rows, P, depth]``; weight ``[blocks, shared, depth]``; offsets
    int32 ``[columns]``; starts int32 (sparse only); bias ``[N]`` int32 or float32; multiplier float32 ``[N]`` (int8
    only); residual, like the output (if any); mask int32 ``[P]`` (packed output with padding); output
    ``[N/4, P, 4]`` uint8 or ``[N, P, 1]`` float32.
    """

    dtype: str  # of the multiplication: int8 or float32
    source_rows: int  # rows of the input: channel words times stride phases
    rows: int  # output rows, a multiple of 4
    source: Geometry
    target: Geometry
    blocks: int
    columns: int
    shared: int
    is_dense: bool
    epilogue: Epilogue
    threads: int = 1

    @property
    def depth(self) -> int:
        """Input channels in a word."""
        return 4 if self.dtype == "int8" else 1

    @property
    def masks_padding(self) -> bool:
        """Whether the output's padding must be overwritten."""
        return self.target.is_padded


def offsets(blocks: Blocks, window: Window, source: Geometry, target: Geometry) -> np.ndarray:
    """For each of the blocks' columns, the distance from an output's position to the word that it reads.

    ``source`` is laid out ``[words, phases, P]``: phases of the window's stride are rows of their own.
    """
    tap, word = np.divmod(blocks.columns.astype(np.int64), blocks.words)
    row = len(window.phases()) * source.positions
    return np.asarray(word * row + tap_offsets(window, source, target)[tap], np.int32)


def tap_offsets(window: Window, source: Geometry, target: Geometry) -> np.ndarray:
    """The same for each tap of ``window``, within one channel word: int64 ``[taps]``."""
    phases = window.phases()
    shifts = [
        phases.index(phase) * source.positions + shift[0] * source.pitch + shift[1] for phase, shift in window.taps()
    ]
    return np.asarray(shifts, np.int64) + (source.base - target.base)


def convolution(work: Convolution, isa: Isa, name: str = "convolution") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""
    return emit.kernel(name, lambda: _Emitter(work, isa).emit())


class _Emitter:
    """Emits one kernel; its fields are the kernel's arguments."""

    def __init__(self, work: Convolution, isa: Isa) -> None:
        self.work, self.isa, self.lanes = work, isa, isa.lanes
        self.acc_dtype = "int32" if work.dtype == "int8" else "float32"
        self.vectors = -(-work.target.span // self.lanes)
        self.tiles = -(-self.vectors // self._largest_tile())

    def _largest_tile(self) -> int:
        """Vectors of positions a tile: as many accumulators as hide the latency and leave registers for operands."""
        return self.isa.registers * 3 // 16 if self.work.shared == QUAD else self.isa.registers // 4

    def emit(self) -> None:
        self._declare()
        work = self.work
        quads = work.rows // QUAD
        smaller, larger = divmod(self.vectors, self.tiles)
        is_heavy = work.blocks * work.shared * self.vectors > _PARALLEL_WORK
        parallel = work.threads > 1 and (is_heavy or quads * self.vectors > _PARALLEL_WORK)
        with emit.loop(self.tiles * quads, parallel) as unit:
            tile, quad = unit // quads, unit % quads
            first = tile * smaller + tirx.min(tile, tirx.const(larger, "int32"))
            if larger == 0:
                self._tile(quad, first, smaller)
            elif self.tiles == 1:
                self._tile(quad, first, smaller + larger)
            else:
                with T.If(tile < larger):
                    with T.Then():
                        self._tile(quad, first, smaller + 1)
                    with T.Else():
                        self._tile(quad, first, smaller)
            if work.masks_padding:
                self._fill_edges(quad, tile)

    def _declare(self) -> None:
        work = self.work
        is_int8 = work.dtype == "int8"
        x = emit.argument("x", (work.source_rows, work.source.positions, work.depth), "uint8" if is_int8 else "float32")
        weight = emit.argument("weight", (work.blocks, work.shared, work.depth), work.dtype)
        self.offset = emit.argument("offset", (work.columns,), "int32")
        if not work.is_dense:
            self.start = emit.argument("start", (work.rows // work.shared + 1,), "int32")
        self.bias = emit.argument("bias", (work.rows,), self.acc_dtype)
        if is_int8:
            self.multiplier = emit.argument("multiplier", (work.rows,), "float32")
        packed = work.epilogue.output == "uint8"
        out_rows, out_depth = (work.rows // QUAD, 4) if packed else (work.rows, 1)
        out_shape = (out_rows, work.target.positions, out_depth)
        residual = emit.argument("residual", out_shape, work.epilogue.output) if work.epilogue.residual else None
        if work.masks_padding:
            self.mask = emit.argument("mask", (work.target.positions,), "int32")
        y = emit.argument("y", out_shape, work.epilogue.output)
        word = "int32" if packed else "float32"
        self.x = emit.words_of(x, self.acc_dtype)
        self.weight = emit.words_of(weight, self.acc_dtype)
        self.residual = emit.words_of(residual, word) if residual is not None else None
        self.y = emit.words_of(y, word)

    def _tile(self, quad: Expr, first: Expr, vectors: int) -> None:
        """All four rows of ``quad`` at ``vectors`` vectors of positions from ``first``."""
        work, lanes = self.work, self.lanes
        width = vectors * lanes
        position = first * lanes + work.target.base
        packed = work.epilogue.output == "uint8"
        staged = T.alloc_buffer((QUAD * width,), "int32", scope="local") if packed else None
        acc = T.alloc_buffer((work.shared * width,), self.acc_dtype, scope="local")
        with emit.loop(QUAD // work.shared) as step:
            row0 = step * work.shared
            for r in range(work.shared):
                for v in range(vectors):
                    bias = emit.splat(self.bias[quad * QUAD + row0 + r], lanes)
                    emit.store(acc, r * width + v * lanes, bias, lanes)
            self._accumulate(acc, quad, row0, position, vectors)
            for r in range(work.shared):
                for v in range(vectors):
                    value = emit.load(acc, r * width + v * lanes, lanes)
                    finished = self._finish(value, quad, row0 + r, position + v * lanes)
                    if staged is not None:
                        emit.store(staged, (row0 + r) * width + v * lanes, finished, lanes)
                    else:
                        row = (quad * QUAD + row0 + r) * work.target.positions
                        finished = self._masked(finished, position + v * lanes, 0.0, "float32")
                        emit.store(self.y, row + position + v * lanes, finished, lanes)
        if staged is not None:
            for v in range(vectors):
                rows = [emit.load(staged, r * width + v * lanes, lanes) for r in range(QUAD)]
                zero = emit.splat_word(work.epilogue.zero_point)
                word = self._masked(emit.pack_bytes(rows, lanes), position + v * lanes, zero, "int32")
                emit.store(self.y, quad * work.target.positions + position + v * lanes, word, lanes)

    def _accumulate(self, acc: Buffer, quad: Expr, row0: Expr, position: Expr, vectors: int) -> None:
        """The inner loop: one offset, ``vectors`` loads, ``shared`` weights, ``vectors * shared`` products a block."""
        work, lanes = self.work, self.lanes
        width = vectors * lanes
        if work.is_dense:
            begin, end, weights = 0, work.columns, quad * work.columns
        else:
            which = (quad * QUAD + row0) // work.shared if work.shared > 1 else quad * QUAD + row0
            begin, end, weights = self.start[which], self.start[which + 1], 0
        with T.serial(begin, end) as j:
            source = self.offset[j] + position
            operands = [emit.splat(self.weight[(weights + j) * work.shared + r], lanes) for r in range(work.shared)]
            for v in range(vectors):
                x = emit.load(self.x, source + v * lanes, lanes)
                for r, w in enumerate(operands):
                    at = r * width + v * lanes
                    old = emit.load(acc, at, lanes)
                    product = self.isa.dot4(old, x, w) if work.dtype == "int8" else x * w + old
                    emit.store(acc, at, product, lanes)

    def _finish(self, acc: Expr, quad: Expr, row: Expr, position: Expr) -> Expr:
        """The epilogue of one vector: requantized int32 0..255, or float32."""
        is_int8 = self.work.dtype == "int8"
        scale = emit.splat(self.multiplier[quad * QUAD + row], self.lanes) if is_int8 else None
        residual = self._residual(quad, row, position)
        return finish(acc, scale, residual, self.work.epilogue, self.lanes)

    def _residual(self, quad: Expr, row: Expr, position: Expr) -> Expr | None:
        lanes, positions = self.lanes, self.work.target.positions
        if self.work.epilogue.residual is None:
            return None
        if self.work.epilogue.output == "float32":
            return emit.load(self.residual, (quad * QUAD + row) * positions + position, lanes)
        word = emit.load(self.residual, quad * positions + position, lanes)
        return centred_residual(emit.byte_of(word, row, lanes), self.work.epilogue, lanes)

    def _masked(self, value: Expr, position: Expr, padding: float, dtype: str) -> Expr:
        """``value`` where a pixel lies, ``padding`` elsewhere."""
        if not self.work.masks_padding:
            return value
        inside = emit.load(self.mask, position, self.lanes) != emit.splat(0, self.lanes)
        return tirx.Select(inside, value, emit.splat(padding, self.lanes, dtype))

    def _fill_edges(self, quad: Expr, tile: Expr) -> None:
        """Padding before the first and after the last tile, written by these two."""
        work, lanes = self.work, self.lanes
        packed = work.epilogue.output == "uint8"
        padding, dtype = (emit.splat_word(work.epilogue.zero_point), "int32") if packed else (0.0, "float32")
        filler = emit.splat(padding, lanes, dtype)
        end = work.target.base + self.vectors * lanes
        for rows in range(1 if packed else QUAD):
            row = quad * work.target.positions if packed else (quad * QUAD + rows) * work.target.positions
            for which, begin, stop in ((0, 0, work.target.base), (self.tiles - 1, end, work.target.positions)):
                if stop > begin:
                    with T.If(tile == which), T.Then(), emit.loop((stop - begin) // lanes) as i:
                        emit.store(self.y, row + begin + i * lanes, filler, lanes)


_PARALLEL_WORK = 20_000  # vector products below which waking the other threads costs more than it saves
