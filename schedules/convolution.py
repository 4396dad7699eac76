"""The kernel of every layer with many positions: linear, 1x1 and k x k convolution, grouped, depthwise.

    Y[n, p] = epilogue(bias[n] + sum over j of W[j] . X[offset[j] + p])

``j`` runs over the blocks of output row ``n`` that are there; only the precomputed offsets know about kernel
positions. A tile holds ``vectors`` vectors of positions for ``shared`` output rows in registers; four output rows
requantize into one packed word. Sparse and dense, int8 and float32 are the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD, Blocks, has_lowest_pairs
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.epilogue import (
    Epilogue,
    finish,
    pack_pair,
    pack_words,
    place_bytes,
    residual_of_word,
    round_unsaturated,
)
from pumice.schedules.geometry import LANES, Geometry
from pumice.schedules.places import Places
from pumice.schedules.tiling import Tiling
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Convolution:
    """One layer's workload. The input plane and the output have the same pitch.

    Arguments of the kernel: x ``[source_rows, P, depth]``; weight ``[blocks, shared, depth]``; offsets int32
    ``[columns]``; starts int32 (sparse only); order int32, see ``row_order`` (if ordered); bias ``[N]`` int32 or
    float32 and multiplier float32 ``[N]`` (int8 only), both in this order; residual, like the output (if any); mask
    int32 ``[P]`` (packed output with padding); output ``[N/4, P, 4]`` uint8 or ``[N, P, 1]`` float32.
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
    tiles: int  # of the reduction
    tile_columns: int  # columns in one of these (dense only; the last may have fewer)
    tiling: Tiling
    epilogue: Epilogue
    threads: int = 1
    has_lowest_pairs: bool = False  # of weights
    is_ordered: bool = False  # whether rows are computed in an order of their own

    @classmethod
    def of(
        cls, blocks: Blocks, source_rows: int, places: Places, tiling: Tiling, epilogue: Epilogue, threads: int = 1
    ) -> Convolution:
        """The workload of ``blocks`` that were cut into tiles of ``tiling.words``."""
        return cls(
            dtype=str(blocks.data.dtype),
            source_rows=source_rows,
            rows=blocks.rows,
            source=places.source,
            target=places.target,
            blocks=int(blocks.data.shape[0]),
            columns=len(blocks.columns),
            shared=blocks.shared,
            is_dense=blocks.is_dense,
            tiles=blocks.tiles,
            tile_columns=blocks.tile_words * blocks.taps if blocks.is_dense else 0,
            tiling=tiling,
            epilogue=epilogue,
            threads=threads,
            has_lowest_pairs=has_lowest_pairs(blocks.data),
            is_ordered=blocks.order is not None,
        )

    @property
    def depth(self) -> int:
        """Input channels in a word."""
        return 4 if self.dtype == "int8" else 1

    @property
    def masks_padding(self) -> bool:
        """Whether the output's padding must be overwritten."""
        return self.target.is_padded


def offsets(blocks: Blocks, places: Places) -> np.ndarray:
    """For each of the blocks' columns, the distance from an output's position to the word that it reads.

    ``places.source`` is laid out ``[words, phases, P]``: phases of the window's stride are rows of their own.
    """
    tap, word = np.divmod(blocks.columns.astype(np.int64), blocks.words)
    row = len(places.window.phases()) * places.source.positions
    return np.asarray(word * row + places.shifts[tap], np.int32)


def row_order(order: np.ndarray) -> np.ndarray:
    """The order of rows as the kernel takes it: it looks a little ahead."""
    return np.pad(order, (0, QUAD * _QUADS_AHEAD))


def convolution(work: Convolution, isa: Isa, name: str = "convolution") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""
    return emit.kernel(name, lambda: _Emitter(work, isa).emit())


class _Emitter:
    """Emits one kernel; its fields are the kernel's arguments."""

    def __init__(self, work: Convolution, isa: Isa) -> None:
        self.work, self.isa, self.lanes = work, isa.for_weights(work.has_lowest_pairs), isa.lanes
        self.acc_dtype = "int32" if work.dtype == "int8" else "float32"
        self.packed = work.epilogue.output == "uint8"
        span = work.target.span
        if isa.is_gpu:  # as ``schedules/cuda`` does: what lies behind the last position is computed by wide vectors
            span = min(-(-span // LANES) * LANES, work.target.positions - work.target.base)
        self.vectors = -(-span // self.lanes)
        self.position_tiles = -(-self.vectors // work.tiling.vectors)
        self.quads = work.rows // QUAD
        self.group = min(work.tiling.rows // QUAD, self.quads)

    def emit(self) -> None:
        self._declare()
        groups = -(-self.quads // self.group)
        with emit.loop(self.position_tiles * groups, self._is_parallel()) as unit:
            tile, first_quad = unit // groups, (unit % groups) * self.group
            quads = tirx.min(tirx.const(self.group, "int32"), self.quads - first_quad)
            if self.quads % self.group == 0:
                quads = self.group
            self._for_width(tile, lambda first, vectors: self._unit(first_quad, quads, first, vectors))
            if self.work.masks_padding:
                with T.serial(0, quads) as q:
                    self._fill_edges(first_quad + q, tile)

    def _is_parallel(self) -> bool:
        work = self.work
        products = work.blocks * work.shared * self.vectors
        return work.threads > 1 and max(products, self.quads * self.vectors) > _PARALLEL_WORK

    def _declare(self) -> None:
        work = self.work
        is_int8 = work.dtype == "int8"
        x = emit.argument("x", (work.source_rows, work.source.positions, work.depth), "uint8" if is_int8 else "float32")
        weight = emit.argument("weight", (work.blocks, work.shared, work.depth), work.dtype)
        self.offset = emit.argument("offset", (work.columns,), "int32")
        if not work.is_dense:
            self.start = emit.argument("start", (work.tiles * (work.rows // work.shared) + 1,), "int32")
        if work.is_ordered:
            self.order = emit.argument("order", (work.rows + QUAD * _QUADS_AHEAD,), "int32")
        self.bias = emit.argument("bias", (work.rows,), self.acc_dtype)
        if is_int8:
            self.multiplier = emit.argument("multiplier", (work.rows,), "float32")
        out_rows, out_depth = (self.quads, 4) if self.packed else (work.rows, 1)
        out_shape = (out_rows, work.target.positions, out_depth)
        residual = emit.argument("residual", out_shape, work.epilogue.output) if work.epilogue.residual else None
        if work.masks_padding:
            self.mask = emit.argument("mask", (work.target.positions,), "int32")
        y = emit.argument("y", out_shape, work.epilogue.output)
        word = "int32" if self.packed else "float32"
        self.x = emit.words_of(x, self.acc_dtype)
        self.weight = emit.words_of(weight, self.acc_dtype)
        self.residual = emit.words_of(residual, word) if residual is not None else None
        self.y = emit.words_of(y, word)

    def _for_width(self, tile: Expr, body: Callable[[Expr, int], None]) -> None:
        """``body(first vector, vectors)`` of a tile of positions; their widths differ by one at most."""
        smaller, larger = divmod(self.vectors, self.position_tiles)
        first = tile * smaller + tirx.min(tile, tirx.const(larger, "int32"))
        emit.either(tile < larger, larger, 1, lambda more: body(first, smaller + more))

    def _unit(self, first_quad: Expr, quads: Expr, first: Expr, vectors: int) -> None:
        """A group of rows at ``vectors`` vectors of positions: the reduction tile by tile, the last one finishes."""
        position = first * self.lanes + self.work.target.base
        last = self.work.tiles - 1
        if last == 0:
            with T.serial(0, quads) as q:
                self._quad(_Quad(first_quad + q, position, vectors), 0)
            return
        size = QUAD * vectors * self.lanes
        waiting = T.alloc_buffer((self.group * size,), self.acc_dtype, scope="global")
        with T.serial(0, quads) as q:
            for r in range(QUAD):
                bias = emit.splat(self.bias[(first_quad + q) * QUAD + r], self.lanes)
                for v in range(vectors):
                    emit.store(waiting, q * size + (r * vectors + v) * self.lanes, bias, self.lanes)
        with emit.loop(last) as tile, T.serial(0, quads) as q:
            self._quad(_Quad(first_quad + q, position, vectors, waiting, q * size), tile)
        with T.serial(0, quads) as q:
            self._quad(_Quad(first_quad + q, position, vectors, waiting, q * size), last)

    def _quad(self, quad: _Quad, tile: Expr | int) -> None:
        """Four output rows, ``shared`` at a time, over one tile of the reduction."""
        lanes, shared = self.lanes, self.work.shared
        places = [(r, v) for r in range(shared) for v in range(quad.vectors)]
        done = _Done(self, quad) if isinstance(tile, int) else None
        if done is not None and self.packed and self.residual is not None:
            ahead = self.output_row((quad.index + _QUADS_AHEAD) * QUAD) // QUAD
            soon = ahead * self.work.target.positions + quad.position
            for v in range(quad.vectors):
                emit.prefetch(self.residual, soon + v * lanes)
        acc = dict(zip(places, emit.registers(len(places), lanes, self.acc_dtype), strict=True))
        for row0 in range(0, QUAD, shared):
            for r, v in places:
                emit.store(acc[r, v], 0, self._initial(quad, row0 + r, v), lanes)
            self._accumulate(acc, quad, row0, tile)
            for r, v in places:
                value = emit.load(acc[r, v], 0, lanes)
                if done is None:
                    emit.store(quad.waiting, quad.place(row0 + r, v, lanes), value, lanes)
                else:
                    done.take(row0 + r, v, value)

    def _initial(self, quad: _Quad, row: int, v: int) -> Expr:
        if quad.waiting is None:
            return emit.splat(self.bias[quad.index * QUAD + row], self.lanes)
        return emit.load(quad.waiting, quad.place(row, v, self.lanes), self.lanes)

    def _accumulate(self, acc: dict[tuple[int, int], Buffer], quad: _Quad, row0: int, tile: Expr | int) -> None:
        """The inner loop: one offset, ``vectors`` loads, ``shared`` weights, ``vectors * shared`` products a block."""
        work, lanes = self.work, self.lanes
        begin, end, weights = self._list(quad, row0, tile)
        if not work.is_dense:
            emit.prefetch(self.weight, begin * work.shared + _AHEAD)
            emit.prefetch(self.offset, begin + _AHEAD)
        with T.serial(begin, end) as j:
            source = self.offset[j] + quad.position
            operands = self._operands((weights + j) * work.shared)
            if work.is_dense:
                emit.prefetch(self.weight, (weights + j) * work.shared + _AHEAD)
            for v in range(quad.vectors):
                x = emit.load(self.x, source + v * lanes, lanes)
                for r, w in enumerate(operands):
                    old = emit.load(acc[r, v], 0, lanes)
                    product = self.isa.dot4(old, x, w) if work.dtype == "int8" else x * w + old
                    emit.store(acc[r, v], 0, product, lanes)

    def _operands(self, first: Expr) -> list[Expr]:
        """The word of each row that shares a block, in all lanes."""
        shared, lanes, isa = self.work.shared, self.lanes, self.isa
        if shared > 1 and isa.by_lane:
            words = emit.load(self.weight, first, shared)
            return [tirx.Shuffle([words] * (lanes // shared), [row] * lanes) for row in range(shared)]
        operands = [emit.splat(self.weight[first + row], lanes) for row in range(shared)]
        if isa.hide is None or self.work.dtype != "int8":
            return operands
        return [isa.hide(lanes, operand) for operand in operands]

    def _list(self, quad: _Quad, row0: int, tile: Expr | int) -> tuple[Expr, Expr, Expr]:
        """The columns of a list, begin and end, and how far its weights lie from these."""
        work = self.work
        if not work.is_dense:
            lists = work.rows // work.shared
            which = tile * lists + (quad.index * QUAD + row0) // work.shared
            return self.start[which], self.start[which + 1], 0
        begin = tile * work.tile_columns
        count = work.columns - begin if isinstance(tile, int) else work.tile_columns
        return begin, begin + count, begin * (self.quads - 1) + quad.index * count

    def output_row(self, row: Expr) -> Expr:
        """The output row that row ``row`` of the lists computes."""
        return self.order[row] if self.work.is_ordered else row

    def masked(self, value: Expr, position: Expr, padding: float, dtype: str) -> Expr:
        """``value`` where a pixel lies, ``padding`` elsewhere."""
        if not self.work.masks_padding:
            return value
        inside = emit.load(self.mask, position, self.lanes) != emit.splat(0, self.lanes)
        return tirx.Select(inside, value, emit.splat(padding, self.lanes, dtype))

    def _fill_edges(self, quad: Expr, tile: Expr) -> None:
        """Padding before the first and after the last tile, written by these two."""
        work, lanes = self.work, self.lanes
        padding = emit.packed_word(work.epilogue.zero_point, self.isa) if self.packed else 0.0
        filler = emit.splat(padding, lanes, "int32" if self.packed else "float32")
        end = work.target.base + self.vectors * lanes
        for rows in range(1 if self.packed else QUAD):
            row = quad * work.target.positions if self.packed else (quad * QUAD + rows) * work.target.positions
            for which, begin, stop in ((0, 0, work.target.base), (self.position_tiles - 1, end, work.target.positions)):
                if stop > begin:
                    with T.If(tile == which), T.Then(), emit.loop((stop - begin) // lanes) as i:
                        emit.store(self.y, row + begin + i * lanes, filler, lanes)


@dataclass(frozen=True)
class _Quad:
    """Four output rows at ``vectors`` vectors from ``position``; between tiles of the reduction their accumulators
    wait at ``slot`` of ``waiting``."""

    index: Expr
    position: Expr
    vectors: int
    waiting: Buffer | None = None
    slot: Expr | int = 0

    def place(self, row: int, v: int, lanes: int) -> Expr:
        """Where the accumulator of ``row`` (0..3) at vector ``v`` waits."""
        return self.slot + (row * self.vectors + v) * lanes


class _Done:
    """Takes the finished accumulators of a quad, row after row, and stores them.

    Bytes are packed as soon as two rows are there: what has been finished then holds few of the registers that the
    accumulators of the next row want.
    """

    def __init__(self, emitter: _Emitter, quad: _Quad) -> None:
        self.emitter, self.quad, self.lanes = emitter, quad, emitter.lanes
        self.rows = [emitter.output_row(quad.index * QUAD + row) for row in range(QUAD)]
        if emitter.packed:
            self.bytes = [tirx.bitwise_and(row, tirx.const(QUAD - 1, "int32")) for row in self.rows]
            self.single = emit.registers(quad.vectors, emitter.lanes, "int32")
            self.pair = emit.registers(quad.vectors, emitter.lanes, "int32")

    def take(self, row: int, v: int, acc: Expr) -> None:
        """The accumulator of ``row`` (0..3) at vector ``v``."""
        epilogue, isa, lanes = self.emitter.work.epilogue, self.emitter.isa, self.lanes
        if not self.emitter.packed:
            self._store_floats(row, v, acc)
            return
        rounded = round_unsaturated(acc, self._scale(row), self._residual(row, v), epilogue, isa)
        if row % 2 == 0:
            emit.store(self.single[v], 0, rounded, lanes)
            return
        pair = pack_pair(emit.load(self.single[v], 0, lanes), rounded, epilogue, isa)
        if row == 1:
            emit.store(self.pair[v], 0, pair, lanes)
            return
        word = pack_words(emit.load(self.pair[v], 0, lanes), pair, epilogue, isa)
        if self.emitter.work.is_ordered:
            word = place_bytes(word, self.bytes, isa)
        word = self.emitter.masked(word, self._position(v), emit.packed_word(epilogue.zero_point, isa), "int32")
        emit.store(self.emitter.y, self._packed_place(v), word, lanes)

    def _store_floats(self, row: int, v: int, acc: Expr) -> None:
        value = finish(acc, self._scale(row), self._residual(row, v), self.emitter.work.epilogue, self.lanes)
        value = self.emitter.masked(value, self._position(v), 0.0, "float32")
        emit.store(self.emitter.y, self.rows[row] * self._positions + self._position(v), value, self.lanes)

    def _scale(self, row: int) -> Expr | None:
        if self.emitter.work.dtype != "int8":
            return None
        return emit.splat(self.emitter.multiplier[self.quad.index * QUAD + row], self.lanes)

    def _residual(self, row: int, v: int) -> Expr | None:
        epilogue, other = self.emitter.work.epilogue, self.emitter.residual
        if other is None:
            return None
        if not self.emitter.packed:
            return emit.load(other, self.rows[row] * self._positions + self._position(v), self.lanes)
        word = emit.load(other, self._packed_place(v), self.lanes)
        byte = self.bytes[row] if self.emitter.work.is_ordered else row
        return residual_of_word(word, byte, epilogue, self.emitter.isa)

    def _packed_place(self, v: int) -> Expr:
        quad = self.rows[0] // QUAD if self.emitter.work.is_ordered else self.quad.index
        return quad * self._positions + self._position(v)

    @property
    def _positions(self) -> int:
        return self.emitter.work.target.positions

    def _position(self, v: int) -> Expr:
        return self.quad.position + v * self.lanes


_QUADS_AHEAD = 2  # rows of a residual are too far apart for the CPU to see what comes next
_AHEAD = 1024  # words: a dense weight is used once, and from memory it comes too late if it is only then asked for
_PARALLEL_WORK = 20_000  # vector products below which waking the other threads costs more than it saves
