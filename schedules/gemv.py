"""The kernel of a linear layer with one row: a matrix times a vector.

With one position there is nothing to broadcast a weight against, so the lanes run over output rows instead
(``schedules/slices.py``), and the weights are streamed once. Dense, a panel of slices multiplies the same word of the
input; sparse, a permutation brings each lane its own word of a window of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.epilogue import Epilogue, centred_residual, finish
from pumice.schedules.slices import PANEL, UNROLL, panels, sharing
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Gemv:
    """One workload. ``rows`` (a multiple of 4) are stored; bias and multiplier are those of ``Slices.per_row``.

    Arguments in order: x ``[source_rows, 1, depth]``; weight ``[count, lanes, depth]``; the arrays of ``Lists``
    (sparse only); bias ``[slices * lanes]`` int32 or float32; multiplier float32 likewise (int8 only); residual like
    the output (if any); output ``[rows/4, 1, 4]`` uint8 or ``[rows, 1, 1]`` float32.
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
        self.parallel = work.threads > 1 and work.count > _PARALLEL_WORK

    def emit(self) -> None:
        self._declare()
        if self.work.is_dense:
            self._dense()
        else:
            self._sparse()

    def _declare(self) -> None:
        work, lanes = self.work, self.lanes
        is_int8 = work.dtype == "int8"
        x = emit.argument("x", (work.source_rows, 1, work.depth), "uint8" if is_int8 else "float32")
        weight = emit.argument("weight", (work.count, lanes, work.depth), work.dtype)
        if not work.is_dense:
            columns = emit.argument("columns", (work.count, lanes), "uint8")
            self.windows = emit.argument("windows", (work.count // sharing(self.isa),), "int32")
            self.starts = emit.argument("starts", (self.slices + 1,), "int32")
            self.order = emit.argument("order", (self.slices * lanes,), "int32")
        self.bias = emit.argument("bias", (self.slices * lanes,), self.acc_dtype)
        if is_int8:
            self.multiplier = emit.argument("multiplier", (self.slices * lanes,), "float32")
        packed = work.epilogue.output == "uint8"
        shape = (work.rows // 4, 1, 4) if packed else (work.rows, 1, 1)
        residual = emit.argument("residual", shape, work.epilogue.output) if work.epilogue.residual else None
        y = emit.argument("y", shape, work.epilogue.output)
        self.x, self.weight = emit.words_of(x, self.acc_dtype), emit.words_of(weight, self.acc_dtype)
        self.y = T.decl_buffer((work.rows,), work.epilogue.output, data=y.data)
        if not work.is_dense:
            self.columns = T.decl_buffer((work.count * lanes,), "uint8", data=columns.data)
        if residual is not None:
            self.residual = T.decl_buffer((work.rows,), work.epilogue.output, data=residual.data)

    def _dense(self) -> None:
        """Panel after panel; there are two sizes at most, and the larger ones come first."""
        sizes = [size for _, size in panels(self.slices)]
        smaller, larger = sizes[-1], sizes.count(sizes[0])
        with emit.loop(len(sizes), self.parallel) as panel:
            if sizes[0] == smaller:
                self._panel(panel * smaller, smaller)
                return
            with T.If(panel < larger):
                with T.Then():
                    self._panel(panel * (smaller + 1), smaller + 1)
                with T.Else():
                    self._panel(panel * smaller + larger, smaller)

    def _panel(self, first: Expr, size: int) -> None:
        """``size`` slices; where they are few, several words at once keep enough accumulators busy."""
        words, lanes = self.work.words, self.lanes
        unroll = max(1, PANEL // size)
        acc = self._accumulators(size * unroll, lambda i: (first + i // unroll) * lanes if i % unroll == 0 else None)

        def products(word: Expr, count: int) -> None:
            for u in range(count):
                x = emit.splat(self.x[word + u], lanes)
                for s in range(size):
                    entry = first * words + (word + u) * size + s
                    self._product(acc, s * unroll + u, x, entry)

        if words >= unroll:
            with emit.loop(words // unroll) as i:
                products(i * unroll, unroll)
        if words % unroll:
            products(tirx.const(words // unroll * unroll, "int32"), words % unroll)
        totals = T.alloc_buffer((size * lanes,), self.acc_dtype, scope="global")
        for s in range(size):
            emit.store(totals, s * lanes, self._total(acc, s * unroll, unroll), lanes)
        with emit.loop(size) as s:
            self._write(emit.load(totals, s * lanes, lanes), first + s)

    def _sparse(self) -> None:
        """Slices are dealt to the threads in turn, for the longest come first."""
        if self.isa.permute is not None and self.work.words < self.isa.window:
            self.x = self._widened_input()
        threads = self.work.threads if self.parallel else 1
        with emit.loop(threads, self.parallel) as thread, emit.loop(-(-self.slices // threads)) as turn:
            which = turn * threads + thread
            if self.slices % threads:
                with T.If(which < self.slices), T.Then():
                    self._slice(which)
            else:
                self._slice(which)

    def _widened_input(self) -> Buffer:
        """A copy of an input that is narrower than a window: nothing is read past its end."""
        words, window = self.work.words, self.isa.window
        copy = T.alloc_buffer((window,), self.acc_dtype, scope="global")
        emit.for_strips(words, self.lanes, lambda i, n: emit.store(copy, i, emit.load(self.x, i, n), n))
        emit.fill(copy, words, window - words, 0 if self.work.dtype == "int8" else 0.0, self.acc_dtype, self.lanes)
        return copy

    def _slice(self, which: Expr) -> None:
        lanes = self.lanes
        acc = self._accumulators(UNROLL, lambda i: which * lanes if i == 0 else None)
        share = sharing(self.isa)
        with T.serial(self.starts[which], self.starts[which + 1]) as step:
            for u in range(UNROLL):
                entry = step * UNROLL + u
                window = self.windows[step * (UNROLL // share) + u // share]
                self._product(acc, u, self._pick(window, entry * lanes), entry)
        self._write(self._total(acc, 0, UNROLL), which)

    def _pick(self, window: Expr, first: Expr) -> Expr:
        """Each lane's word of the window; ``first`` is the place of the first lane's column."""
        lanes, isa = self.lanes, self.isa
        if isa.permute is None:
            words = [self.x[window + tirx.Cast("int32", self.columns[first + i])] for i in range(lanes)]
            return tirx.Shuffle(words, list(range(lanes)))
        index = tirx.Cast(f"int32x{lanes}", emit.load(self.columns, first, lanes))
        tables = [emit.load(self.x, window + at, lanes) for at in range(0, isa.window, lanes)]
        words = isa.permute([tirx.reinterpret(f"int32x{lanes}", table) for table in tables], index)
        return tirx.reinterpret(f"{self.acc_dtype}x{lanes}", words)

    def _accumulators(self, count: int, bias_of: Callable[[int], Expr | None]) -> Buffer:
        """``count`` accumulators: the bias, from the row that ``bias_of`` says, or zero."""
        lanes = self.lanes
        acc = T.alloc_buffer((count * lanes,), self.acc_dtype, scope="global")
        zero = emit.splat(0 if self.work.dtype == "int8" else 0.0, lanes, self.acc_dtype)
        for i in range(count):
            row = bias_of(i)
            emit.store(acc, i * lanes, zero if row is None else emit.load(self.bias, row, lanes), lanes)
        return acc

    def _product(self, acc: Buffer, unit: int, x: Expr, entry: Expr) -> None:
        lanes = self.lanes
        w = emit.load(self.weight, entry * lanes, lanes)
        old = emit.load(acc, unit * lanes, lanes)
        new = self.isa.dot4(old, x, w) if self.work.dtype == "int8" else x * w + old
        emit.store(acc, unit * lanes, new, lanes)

    def _total(self, acc: Buffer, first: int, count: int) -> Expr:
        total = emit.load(acc, first * self.lanes, self.lanes)
        for u in range(first + 1, first + count):
            total = total + emit.load(acc, u * self.lanes, self.lanes)
        return total

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
        """``count`` lanes; in a row if all of a dense slice are there, else one by one."""
        lanes, dtype = self.lanes, self.work.epilogue.output
        first = which * lanes
        in_a_row = self.work.is_dense and count == lanes
        residual = None
        if self.work.epilogue.residual is not None:
            other = T.alloc_buffer((lanes,), dtype, scope="global")
            if in_a_row:
                emit.store(other, 0, emit.load(self.residual, first, lanes), lanes)
            else:
                emit.store(other, 0, emit.splat(tirx.const(0, dtype), lanes), lanes)
                for i in range(count):
                    T.buffer_store(other, self.residual[self._row(first + i)], [i])
            residual = emit.load(other, 0, lanes)
        value = self._finish(total, first, residual)
        if in_a_row:
            emit.store(self.y, first, value, lanes)
            return
        staged = T.alloc_buffer((lanes,), dtype, scope="global")
        emit.store(staged, 0, value, lanes)
        for i in range(count):
            T.buffer_store(self.y, staged[i], [self._row(first + i)])

    def _row(self, place: Expr) -> Expr:
        """The output row of a lane."""
        return place if self.work.is_dense else self.order[place]

    def _finish(self, total: Expr, first: Expr, residual: Expr | None) -> Expr:
        work, lanes = self.work, self.lanes
        if residual is not None and work.epilogue.output == "uint8":
            residual = centred_residual(tirx.Cast(f"int32x{lanes}", residual), work.epilogue, lanes)
        scale = emit.load(self.multiplier, first, lanes) if work.dtype == "int8" else None
        value = finish(total, scale, residual, work.epilogue, lanes)
        return tirx.Cast(f"uint8x{lanes}", value) if work.epilogue.output == "uint8" else value


_PARALLEL_WORK = 20_000  # vector products below which waking the other threads costs more than it saves
