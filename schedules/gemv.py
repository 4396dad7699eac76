"""The kernel of a linear layer with few rows: a matrix times a vector, or up to ``MOST_POSITIONS`` of them.

With few positions there is little to broadcast a weight against, so the lanes run over output rows instead
(``schedules/slices.py``), and the weights are streamed once: what is loaded of them serves every position while it is
in registers. Dense, a panel of slices multiplies the same word of the input; sparse, a permutation brings each lane
its own word of a window of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.epilogue import Epilogue, centred_residual, finish
from pumice.schedules.geometry import Geometry
from pumice.schedules.places import Places
from pumice.schedules.slices import PANEL, UNROLL, panels, sharing, window
from pumice.targets.isa import Isa

MOST_POSITIONS = 8  # beyond, the lanes of the convolution kernel are full enough


def has_few_positions(places: Places) -> bool:
    """Whether a layer is one for this kernel; which positions it has, ``places.target.span`` says."""
    return places.is_pointwise and places.target.span <= MOST_POSITIONS


@dataclass(frozen=True)
class Gemv:
    """One workload. ``rows`` (a multiple of 4) are stored; bias and multiplier are those of ``Slices.per_row``.

    Arguments in order, with the ``P`` that ``positions`` take when they lie side by side: x ``[source_rows, P,
    depth]``; weight ``[count, lanes, depth]``; the arrays of ``Lists`` (sparse only); bias ``[slices * lanes]`` int32
    or float32; multiplier float32 likewise (int8 only); residual like the output (if any); output ``[rows/4, P, 4]``
    uint8 or ``[rows, P, 1]`` float32, of which nothing beyond ``positions`` is written.
    """

    dtype: str
    words: int
    rows: int
    count: int
    is_dense: bool
    epilogue: Epilogue
    threads: int = 1
    positions: int = 1
    has_lowest_pairs: bool = False  # of weights

    @property
    def depth(self) -> int:
        """Input channels in a word."""
        return 4 if self.dtype == "int8" else 1

    @property
    def source_rows(self) -> int:
        """Rows of the input. Float rows come in quads: what the last ones hold, be it NaN, is never read."""
        return self.words if self.dtype == "int8" else -(-self.words // 4) * 4

    @property
    def pitch(self) -> int:
        """``P``: positions from a row of the input or the output to the next."""
        return Geometry.of_tokens(self.positions).positions


def gemv(work: Gemv, isa: Isa, name: str = "gemv") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""
    return emit.kernel(name, lambda: _Emitter(work, isa).emit())


class _Emitter:
    def __init__(self, work: Gemv, isa: Isa) -> None:
        self.work, self.isa, self.lanes = work, isa.for_weights(work.has_lowest_pairs), isa.lanes
        self.positions, self.pitch = work.positions, work.pitch
        self.window = window(isa, work.positions)
        self.slices = -(-work.rows // isa.lanes)
        self.acc_dtype = "int32" if work.dtype == "int8" else "float32"
        self.parallel = work.threads > 1 and work.count * work.positions > _PARALLEL_WORK
        packed = work.epilogue.output == "uint8"
        self.out_depth = 4 if packed else 1
        # What is stored at once, unless a whole vector is: words of bytes, and where rows are in disorder single ones.
        self.unit = 4 if packed and work.is_dense else 1
        self.unit_dtype = "int32" if self.unit > 1 else work.epilogue.output

    def emit(self) -> None:
        self._declare()
        if self.work.is_dense:
            self._dense()
        else:
            self._sparse()

    def _declare(self) -> None:
        work, lanes = self.work, self.lanes
        is_int8 = work.dtype == "int8"
        x = emit.argument("x", (work.source_rows, self.pitch, work.depth), "uint8" if is_int8 else "float32")
        weight = emit.argument("weight", (work.count, lanes, work.depth), work.dtype)
        if not work.is_dense:
            columns = emit.argument("columns", (work.count, lanes), "uint8")
            self.windows = emit.argument("windows", (work.count // sharing(self.isa, work.positions),), "int32")
            self.starts = emit.argument("starts", (self.slices + 1,), "int32")
            self.order = emit.argument("order", (self.slices * lanes,), "int32")
        self.bias = emit.argument("bias", (self.slices * lanes,), self.acc_dtype)
        if is_int8:
            self.multiplier = emit.argument("multiplier", (self.slices * lanes,), "float32")
        shape = (work.rows // self.out_depth, self.pitch, self.out_depth)
        residual = emit.argument("residual", shape, work.epilogue.output) if work.epilogue.residual else None
        y = emit.argument("y", shape, work.epilogue.output)
        self.x, self.weight = emit.words_of(x, self.acc_dtype), emit.words_of(weight, self.acc_dtype)
        self.stride, self.step = self.pitch, 1  # of ``x``, from a word to the next and from a position to the next
        if not work.is_dense:
            self.columns = T.decl_buffer((work.count * lanes,), "uint8", data=columns.data)
        self.y, self.residual = self._units(y), None if residual is None else self._units(residual)

    def _units(self, buffer: Buffer) -> Buffer:
        return T.decl_buffer((self.work.rows * self.pitch // self.unit,), self.unit_dtype, data=buffer.data)

    def _dense(self) -> None:
        """Panel after panel; there are two sizes at most, and the larger ones come first."""
        sizes = [size for _, size in panels(self.slices, self.isa, self.positions)]
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
        words, lanes, positions = self.work.words, self.lanes, self.positions
        unroll = max(1, PANEL // (size * positions))
        acc = [self._accumulators((first + s) * lanes, unroll) for s in range(size)]

        def products(word: Expr, count: int) -> None:
            for u in range(count):
                entry = first * words + (word + u) * size
                weights = [emit.load(self.weight, (entry + s) * lanes, lanes) for s in range(size)]
                inputs = [emit.splat(self.x[(word + u) * self.pitch + p], lanes) for p in range(positions)]
                for p in range(positions):
                    for s in range(size):
                        self._product(acc[s][p][u], inputs[p], weights[s])

        if words >= unroll:
            with emit.loop(words // unroll) as i:
                products(i * unroll, unroll)
        if words % unroll:
            products(tirx.const(words // unroll * unroll, "int32"), words % unroll)
        totals = T.alloc_buffer((size * positions * lanes,), self.acc_dtype, scope="global")
        for s in range(size):
            self._put_totals(totals, s * positions * lanes, acc[s])
        with emit.loop(size) as s:
            self._write(totals, s * positions * lanes, first + s)

    def _sparse(self) -> None:
        """Slices are dealt to the threads in turn, for the longest come first."""
        if self.isa.permute is not None and (self.positions > 1 or self.work.words < self.window):
            self._gather_input()
        threads = self.work.threads if self.parallel else 1
        with emit.loop(threads, self.parallel) as thread, emit.loop(-(-self.slices // threads)) as turn:
            which = turn * threads + thread
            if self.slices % threads:
                with T.If(which < self.slices), T.Then():
                    self._slice(which)
            else:
                self._slice(which)

    def _gather_input(self) -> None:
        """A copy with the words of each position side by side, a window at least: nothing is read past its end."""
        words, length = self.work.words, max(self.work.words, self.window)
        copy = T.alloc_buffer((self.positions * length,), self.acc_dtype, scope="global")
        zero = 0 if self.work.dtype == "int8" else 0.0
        if self.positions == 1:
            emit.for_strips(words, self.lanes, lambda i, n: emit.store(copy, i, emit.load(self.x, i, n), n))
        else:
            with emit.loop(words) as word:
                for p in range(self.positions):
                    T.buffer_store(copy, self.x[word * self.pitch + p], [word + p * length])
        for p in range(self.positions):
            emit.fill(copy, p * length + words, length - words, zero, self.acc_dtype, self.lanes)
        self.x, self.stride, self.step = copy, 1, length

    def _slice(self, which: Expr) -> None:
        lanes, share = self.lanes, sharing(self.isa, self.positions)
        acc = self._accumulators(which * lanes, max(1, UNROLL // self.positions))
        with T.serial(self.starts[which], self.starts[which + 1]) as step:
            entries = [step * UNROLL + u for u in range(UNROLL)]
            windows = [self.windows[step * (UNROLL // share) + u // share] for u in range(UNROLL)]
            weights = [emit.load(self.weight, entry * lanes, lanes) for entry in entries]
            for p in range(self.positions):
                for u in range(UNROLL):
                    x = self._pick(windows[u] * self.stride + p * self.step, entries[u] * lanes)
                    self._product(acc[p][u % len(acc[p])], x, weights[u])
        totals = T.alloc_buffer((self.positions * lanes,), self.acc_dtype, scope="global")
        self._put_totals(totals, 0, acc)
        self._write(totals, 0, which)

    def _pick(self, start: Expr, first: Expr) -> Expr:
        """Each lane's word of the window at ``start``; ``first`` is the place of the first lane's column."""
        lanes, isa = self.lanes, self.isa
        if isa.permute is None:
            words = [self.x[start + tirx.Cast("int32", self.columns[first + i]) * self.stride] for i in range(lanes)]
            return tirx.Shuffle(words, list(range(lanes)))
        index = tirx.Cast(f"int32x{lanes}", emit.load(self.columns, first, lanes))
        tables = [emit.load(self.x, start + at, lanes) for at in range(0, self.window, lanes)]
        words = isa.permute([tirx.reinterpret(f"int32x{lanes}", table) for table in tables], index)
        return tirx.reinterpret(f"{self.acc_dtype}x{lanes}", words)

    def _accumulators(self, first: Expr, count: int) -> list[list[Buffer]]:
        """``count`` for each position, to be added up: one starts with the bias of the rows from ``first``."""
        lanes = self.lanes
        acc = [emit.registers(count, lanes, self.acc_dtype) for _ in range(self.positions)]
        zero = emit.splat(0 if self.work.dtype == "int8" else 0.0, lanes, self.acc_dtype)
        for of_position in acc:
            for i, register in enumerate(of_position):
                emit.store(register, 0, zero if i else emit.load(self.bias, first, lanes), lanes)
        return acc

    def _product(self, acc: Buffer, x: Expr, w: Expr) -> None:
        old = emit.load(acc, 0, self.lanes)
        new = self.isa.dot4(old, x, w) if self.work.dtype == "int8" else x * w + old
        emit.store(acc, 0, new, self.lanes)

    def _put_totals(self, totals: Buffer, first: int, acc: Sequence[Sequence[Buffer]]) -> None:
        """The sum of each position's accumulators."""
        for p, of_position in enumerate(acc):
            total = emit.load(of_position[0], 0, self.lanes)
            for register in of_position[1:]:
                total = total + emit.load(register, 0, self.lanes)
            emit.store(totals, first + p * self.lanes, total, self.lanes)

    def _write(self, totals: Buffer, at: Expr, which: Expr) -> None:
        """Epilogue and store of a slice, whose totals lie at ``at``; the last slice may be cut off in the middle."""
        first = which * self.lanes
        place = self._place_of(first)

        def write(count: int) -> None:
            with emit.loop(self.positions) as p:
                total = emit.load(totals, at + p * self.lanes, self.lanes)
                self._store(total, first, lambda i: place(i) + p * (self.out_depth // self.unit), count)

        rest = self.work.rows % self.lanes
        if rest == 0:
            write(self.lanes)
        elif self.slices == 1:
            write(rest)
        else:
            with T.If(which < self.slices - 1):
                with T.Then():
                    write(self.lanes)
                with T.Else():
                    write(rest)

    def _place_of(self, first: Expr) -> Callable[[int], Expr]:
        """Where the output has unit ``i`` of the slice from ``first`` on, at the first position."""
        lanes, pitch = self.lanes, self.pitch
        if self.work.is_dense:
            return lambda i: (tirx.floordiv(first, self.unit) + i) * pitch
        places = T.alloc_buffer((lanes,), "int32", scope="global")
        rows = emit.load(self.order, first, lanes)
        if self.out_depth == 4:
            quads = tirx.shift_right(rows, emit.splat(2, lanes))
            rows = quads * emit.splat(4 * pitch, lanes) + tirx.bitwise_and(rows, emit.splat(3, lanes))
        else:
            rows = rows * emit.splat(pitch, lanes)
        emit.store(places, 0, rows, lanes)
        return lambda i: places[i]

    def _store(self, total: Expr, first: Expr, place: Callable[[int], Expr], count: int) -> None:
        """``count`` lanes; in a row if all of a dense slice with one position are there, else one by one."""
        lanes, unit, dtype = self.lanes, self.unit, self.unit_dtype
        in_a_row = self.work.is_dense and count == lanes and self.pitch == 1
        residual = None
        if self.residual is not None:
            other = T.alloc_buffer((lanes // unit,), dtype, scope="global")
            if in_a_row:
                emit.store(other, 0, emit.load(self.residual, place(0), lanes // unit), lanes // unit)
            else:
                emit.store(other, 0, emit.splat(tirx.const(0, dtype), lanes // unit), lanes // unit)
                for i in range(count // unit):
                    T.buffer_store(other, self.residual[place(i)], [i])
            residual = self._viewed(emit.load(other, 0, lanes // unit), self.work.epilogue.output, lanes)
        value = self._viewed(self._finish(total, first, residual), dtype, lanes // unit)
        if in_a_row:
            emit.store(self.y, place(0), value, lanes // unit)
            return
        staged = T.alloc_buffer((lanes // unit,), dtype, scope="global")
        emit.store(staged, 0, value, lanes // unit)
        for i in range(count // unit):
            T.buffer_store(self.y, staged[i], [place(i)])

    def _viewed(self, value: Expr, dtype: str, lanes: int) -> Expr:
        """Bytes as words, words as bytes; what has no words stays."""
        return tirx.reinterpret(emit.vector(dtype, lanes), value) if self.unit > 1 else value

    def _finish(self, total: Expr, first: Expr, residual: Expr | None) -> Expr:
        work, lanes = self.work, self.lanes
        if residual is not None and work.epilogue.output == "uint8":
            stored = emit.turn_each(tirx.Cast(emit.vector("int32", lanes), residual), self.isa, lanes)
            residual = centred_residual(stored, work.epilogue, lanes)
        scale = emit.load(self.multiplier, first, lanes) if work.dtype == "int8" else None
        value = finish(total, scale, residual, work.epilogue, lanes)
        if work.epilogue.output == "uint8":
            return tirx.Cast(emit.vector("uint8", lanes), emit.turn_each(value, self.isa, lanes))
        return value


_PARALLEL_WORK = 20_000  # vector products below which waking the other threads costs more than it saves
