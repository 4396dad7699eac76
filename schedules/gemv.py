"""The kernel of a linear layer with one row: a matrix times a vector.

With one position there is nothing to broadcast a weight against, so the lanes run over output rows instead: a
*slice* is as many output rows as a vector has lanes, and its weights are streamed once. Dense, every row of a slice
multiplies the same word of the input; sparse, each has its own list (SELL-C of Kreutzer et al., SIAM J. Sci. Comput.
36-5, 2014, with int8 words for elements), padded to the longest of the slice, and gathers its words from the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.epilogue import Epilogue, centred_residual, finish
from pumice.targets.isa import Isa

UNROLL = 4  # independent accumulators: they hide the latency of the product


@dataclass(frozen=True)
class Slices:
    """A weight in slices of ``lanes`` output rows.

    data: int8 ``[count, lanes, 4]`` or float32 ``[count, lanes, 1]``: entry after entry, slice after slice
    columns: int32 ``[count, lanes]``, which word of the input each lane multiplies; None if dense
    starts: int32 ``[slices + 1]``; None if dense
    """

    data: np.ndarray
    columns: np.ndarray | None
    starts: np.ndarray | None
    words: int

    @property
    def work(self) -> int:
        """Vector products."""
        return int(self.data.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes stored: weights and lists."""
        lists = [array.nbytes for array in (self.columns, self.starts) if array is not None]
        return self.data.nbytes + sum(lists)


def slice_rows(rows: np.ndarray, lanes: int, sparse: bool) -> Slices:
    """Slices of ``rows`` ``[N, 1, C]``, int8 or float32."""
    depth = 4 if rows.dtype == np.int8 else 1
    matrix = np.pad(rows[:, 0, :], ((0, -len(rows) % lanes), (0, -rows.shape[2] % depth)))
    words = matrix.shape[1] // depth
    slices = matrix.reshape(-1, lanes, words, depth)
    if not sparse:
        return Slices(np.ascontiguousarray(slices.transpose(0, 2, 1, 3)).reshape(-1, lanes, depth), None, None, words)
    present = slices.any(axis=3)
    longest = present.sum(axis=2).max(axis=1)
    lengths = -(-longest // UNROLL) * UNROLL
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    data = np.zeros((int(starts[-1]), lanes, depth), rows.dtype)
    columns = np.zeros((int(starts[-1]), lanes), np.int32)
    order = np.cumsum(present, axis=2) - 1
    which, lane, word = np.nonzero(present)
    entry = starts[which] + order[which, lane, word]
    data[entry, lane] = slices[which, lane, word]
    columns[entry, lane] = word
    return Slices(data, columns, starts, words)


@dataclass(frozen=True)
class Gemv:
    """One workload. ``rows`` (a multiple of 4) are stored; bias and multiplier are padded to whole slices.

    Arguments in order: x ``[source_rows, 1, depth]``; weight ``[count, lanes, depth]``; columns int32
    ``[count, lanes]`` and starts int32 ``[slices + 1]`` (sparse only); bias ``[slices * lanes]`` int32 or float32;
    multiplier float32 likewise (int8 only); residual like the output (if any); output ``[rows/4, 1, 4]`` uint8 or
    ``[rows, 1, 1]`` float32.
    """

    dtype: str
    words: int
    rows: int
    count: int
    is_dense: bool
    epilogue: Epilogue
    threads: int = 1

    @property
    def depth(self) -> int:
        """Input channels in a word."""
        return 4 if self.dtype == "int8" else 1

    @property
    def source_rows(self) -> int:
        """Rows of the input. Float rows come in quads: what the last ones hold, be it NaN, is never read."""
        return self.words if self.dtype == "int8" else -(-self.words // 4) * 4


def gemv(work: Gemv, isa: Isa, name: str = "gemv") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""
    return emit.kernel(name, lambda: _Emitter(work, isa).emit())


class _Emitter:
    def __init__(self, work: Gemv, isa: Isa) -> None:
        self.work, self.isa, self.lanes = work, isa, isa.lanes
        self.slices = -(-work.rows // isa.lanes)
        self.acc_dtype = "int32" if work.dtype == "int8" else "float32"

    def emit(self) -> None:
        self._declare()
        work, lanes = self.work, self.lanes
        parallel = work.threads > 1 and work.count > _PARALLEL_WORK
        with emit.loop(self.slices, parallel) as which:
            acc = T.alloc_buffer((UNROLL * lanes,), self.acc_dtype, scope="local")
            for u in range(UNROLL):
                zero = emit.splat(0 if work.dtype == "int8" else 0.0, lanes, self.acc_dtype)
                emit.store(acc, u * lanes, emit.load(self.bias, which * lanes, lanes) if u == 0 else zero, lanes)
            self._accumulate(acc, which)
            total = emit.load(acc, 0, lanes)
            for u in range(1, UNROLL):
                total = total + emit.load(acc, u * lanes, lanes)
            self._write(total, which)

    def _declare(self) -> None:
        work, lanes = self.work, self.lanes
        is_int8 = work.dtype == "int8"
        x = emit.argument("x", (work.source_rows, 1, work.depth), "uint8" if is_int8 else "float32")
        weight = emit.argument("weight", (work.count, lanes, work.depth), work.dtype)
        if not work.is_dense:
            columns = emit.argument("columns", (work.count, lanes), "int32")
            self.starts = emit.argument("starts", (self.slices + 1,), "int32")
        self.bias = emit.argument("bias", (self.slices * lanes,), self.acc_dtype)
        if is_int8:
            self.multiplier = emit.argument("multiplier", (self.slices * lanes,), "float32")
        packed = work.epilogue.output == "uint8"
        shape = (work.rows // 4, 1, 4) if packed else (work.rows, 1, 1)
        residual = emit.argument("residual", shape, work.epilogue.output) if work.epilogue.residual else None
        y = emit.argument("y", shape, work.epilogue.output)
        self.x, self.weight = emit.words_of(x, self.acc_dtype), emit.words_of(weight, self.acc_dtype)
        if not work.is_dense:
            self.columns = emit.words_of(columns)
        self.y = T.decl_buffer((work.rows,), work.epilogue.output, data=y.data)
        if residual is not None:
            self.residual = T.decl_buffer((work.rows,), work.epilogue.output, data=residual.data)

    def _accumulate(self, acc: Buffer, which: Expr) -> None:
        work = self.work
        if not work.is_dense:
            begin = self.starts[which]
            with T.serial(0, (self.starts[which + 1] - begin) // UNROLL) as i:
                for u in range(UNROLL):
                    self._product(acc, u, begin + i * UNROLL + u, None)
            return
        whole = work.words // UNROLL
        if whole:
            with emit.loop(whole) as i:
                for u in range(UNROLL):
                    self._product(acc, u, which * work.words + i * UNROLL + u, i * UNROLL + u)
        for word in range(whole * UNROLL, work.words):
            self._product(acc, word % UNROLL, which * work.words + word, tirx.const(word, "int32"))

    def _product(self, acc: Buffer, unit: int, entry: Expr, word: Expr | None) -> None:
        """One entry of a slice times its word of the input: the same word for all lanes, or each lane's own."""
        lanes = self.lanes
        if word is not None:
            x = emit.splat(self.x[word], lanes)
        else:
            x = self.x[emit.load(self.columns, entry * lanes, lanes)]
        w = emit.load(self.weight, entry * lanes, lanes)
        old = emit.load(acc, unit * lanes, lanes)
        new = self.isa.dot4(old, x, w) if self.work.dtype == "int8" else x * w + old
        emit.store(acc, unit * lanes, new, lanes)

    def _write(self, total: Expr, which: Expr) -> None:
        """Epilogue and store; the last slice may be cut off in the middle."""
        rest = self.work.rows % self.lanes
        if rest == 0:
            self._store(total, which, self.lanes)
        elif self.slices == 1:
            self._store(total, which, rest)
        else:
            with T.If(which < self.slices - 1):
                with T.Then():
                    self._store(total, which, self.lanes)
                with T.Else():
                    self._store(total, which, rest)

    def _store(self, total: Expr, which: Expr, count: int) -> None:
        lanes, dtype = self.lanes, self.work.epilogue.output
        row = which * lanes
        residual = None
        if self.work.epilogue.residual is not None:
            other = T.alloc_buffer((lanes,), dtype, scope="local")
            if count == lanes:
                emit.store(other, 0, emit.load(self.residual, row, lanes), lanes)
            else:
                emit.store(other, 0, emit.splat(tirx.const(0, dtype), lanes), lanes)
                for i in range(count):
                    T.buffer_store(other, self.residual[row + i], [i])
            residual = emit.load(other, 0, lanes)
        value = self._finish(total, row, residual)
        if count == lanes:
            emit.store(self.y, row, value, lanes)
            return
        staged = T.alloc_buffer((lanes,), dtype, scope="local")
        emit.store(staged, 0, value, lanes)
        for i in range(count):
            T.buffer_store(self.y, staged[i], [row + i])

    def _finish(self, total: Expr, row: Expr, residual: Expr | None) -> Expr:
        work, lanes = self.work, self.lanes
        if residual is not None and work.epilogue.output == "uint8":
            residual = centred_residual(tirx.Cast(f"int32x{lanes}", residual), work.epilogue, lanes)
        scale = emit.load(self.multiplier, row, lanes) if work.dtype == "int8" else None
        value = finish(total, scale, residual, work.epilogue, lanes)
        return tirx.Cast(f"uint8x{lanes}", value) if work.epilogue.output == "uint8" else value


_PARALLEL_WORK = 20_000  # vector products below which waking the other threads costs more than it saves
