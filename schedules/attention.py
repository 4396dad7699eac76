"""Attention of several heads on packed float32, scores and probabilities never leaving the cache.

    S[j, i] = scale * sum over c of K[c, j] * Q[c, i] + bias[j, i]
    O[c, i] = sum over j of V[c, j] * exp(S[j, i]) / sum over j of exp(S[j, i])

Vaswani et al., arXiv 1706.03762. In packed form channels are rows and positions run along them, so everything is
computed transposed: the lanes are queries ``i``, each score needs one broadcast of K and one load of Q, and softmax
over ``j`` is vertical, without a sum across lanes. A tile of queries goes through all keys in blocks whose scores
stay in the second-level cache, with the running maximum and sum of Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.targets.isa import Isa

KEYS = 256  # of a block at most: a tile of queries against them stays in the second-level cache
LOWEST = -3.4028234663852886e38  # the lowest float32 that is not -inf
QUAD = 4  # rows of a product that share the loads of a vector; four output rows are one packed word


@dataclass(frozen=True)
class Heads:
    """Where one operand's heads lie in a packed float32 tensor ``[rows, P, 1]``.

    Channel ``c`` of head ``h`` is row ``first + h * stride + c``; token ``t`` of sequence ``b`` is position
    ``b * length + t``.
    """

    rows: int
    positions: int
    length: int
    first: int
    stride: int


@dataclass(frozen=True)
class Bias:
    """What is added to the scores, keys outermost: float32 ``[keys or more, positions]``.

    Column ``(b * heads + h) * queries + i``, where an axis along which the bias repeats has the size 1.
    """

    rows: int
    positions: int
    batch: int
    heads: int
    queries: int


@dataclass(frozen=True)
class Requantize:
    """uint8 output: ``clamp(round_half_even(value * multiplier) + zero_point, 0, 255)``."""

    multiplier: float
    zero_point: int


@dataclass(frozen=True)
class Attention:
    """The workload. Arguments: q, k, v packed float32; bias (if any); y.

    ``y`` is packed float32 ``[heads * value_size rounded up to 4, P, 1]``, or with ``requantize`` uint8
    ``[heads * value_size / 4, P, 4]`` where ``value_size`` is a multiple of 4. A query all of whose scores are -inf is
    NaN, as the formula says, or 0 if ``guarded``; one with a NaN or +inf is NaN.
    """

    batch: int
    heads: int
    head_size: int
    value_size: int
    scale: float
    q: Heads
    k: Heads
    v: Heads
    bias: Bias | None = None
    guarded: bool = False
    requantize: Requantize | None = None
    threads: int = 1

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """The packed shape of ``y``."""
        quads = -(-self.heads * self.value_size // QUAD)
        return (quads, self.q.positions, 4) if self.requantize else (quads * QUAD, self.q.positions, 1)


def attention(work: Attention, isa: Isa, name: str = "attention") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""
    return emit.kernel(name, lambda: _Emitter(work, isa).emit())


class _Emitter:
    """Emits one kernel; its fields are the kernel's arguments and the sizes of a tile."""

    def __init__(self, work: Attention, isa: Isa) -> None:
        self.work, self.isa = work, isa
        # Short sequences get shorter vectors, so that no lane is outside of its sequence.
        self.lanes = min(isa.lanes, 1 << (work.q.length.bit_length() - 1))
        self.vectors = -(-work.q.length // self.lanes)
        self.tiles = -(-self.vectors // (isa.registers * 3 // 16))
        self.keys = -(-work.k.length // -(-work.k.length // KEYS))
        self.keys += -self.keys % QUAD

    def emit(self) -> None:
        self._declare()
        work = self.work
        smaller, larger = divmod(self.vectors, self.tiles)
        macs = work.batch * work.heads * work.q.length * work.k.length * (work.head_size + work.value_size)
        parallel = work.threads > 1 and macs > _PARALLEL_WORK
        with emit.loop(work.batch * work.heads * self.tiles, parallel) as unit:
            tile, head, batch = unit % self.tiles, unit // self.tiles % work.heads, unit // (self.tiles * work.heads)
            first = tile * smaller + tirx.min(tile, tirx.const(larger, "int32"))
            emit.either(tile < larger, larger, 1, lambda more: self._tile(batch, head, first, smaller + more))
            self._fill_rest(unit)

    def _fill_rest(self, unit: Expr) -> None:
        """Channels that only fill up the last word."""
        work = self.work
        rest = work.output_shape[0] - work.heads * work.value_size
        if not work.requantize and rest:
            end = work.heads * work.value_size * work.q.positions
            with T.If(unit == 0), T.Then():
                emit.fill(self.y, end, rest * work.q.positions, 0.0, "float32", self.lanes)

    def _declare(self) -> None:
        work = self.work
        specs = {
            name: ((heads.rows, heads.positions, 1), "float32")
            for name, heads in (("q", work.q), ("k", work.k), ("v", work.v))
        }
        if work.bias is not None:
            specs["bias"] = ((work.bias.rows, work.bias.positions, 1), "float32")
        specs["y"] = (work.output_shape, "uint8" if work.requantize else "float32")
        self.q, self.k, self.v, *bias, self.y = emit.arguments(**specs)
        self.bias: Buffer = bias[0] if bias else None

    def _tile(self, batch: Expr, head: Expr, first: Expr, vectors: int) -> None:
        """All output channels of ``head`` at ``vectors`` vectors of queries of sequence ``batch``."""
        _Tile(self, batch, head, first, vectors).emit()


class _Tile:
    """One tile of queries of one head; its buffers hold ``width`` queries a row."""

    def __init__(self, kernel: _Emitter, batch: Expr, head: Expr, first: Expr, vectors: int) -> None:
        self.kernel, self.work, self.lanes = kernel, kernel.work, kernel.lanes
        self.batch, self.head, self.vectors = batch, head, vectors
        self.width = vectors * self.lanes
        starts = [(first + v) * self.lanes for v in range(vectors)]
        last = self.work.q.length - self.lanes
        if self.work.q.length % self.lanes:  # the last vector overlaps its neighbour rather than leave the sequence
            starts[-1] = tirx.min(starts[-1], tirx.const(last, "int32"))
        self.starts = starts

    def emit(self) -> None:
        work, keys = self.work, self.kernel.keys
        self.query = self._buffer(work.head_size)
        self.scores = self._buffer(min(keys, work.k.length))
        self.largest, self.total = self._buffer(1), self._buffer(1)
        self._copy_queries()
        for v in range(self.vectors):
            self._set(self.largest, v, emit.splat(float("-inf"), self.lanes, "float32"))
            self._set(self.total, v, emit.splat(0.0, self.lanes, "float32"))
        whole, rest = divmod(work.k.length, keys)
        if whole + (rest > 0) == 1:
            self._block(tirx.const(0, "int32"), work.k.length, True, True)
            return
        self.output, self.shrink = self._buffer(work.value_size), self._buffer(1)
        self._block(tirx.const(0, "int32"), keys, True, False)
        if whole - (rest == 0) > 1:
            with emit.loop(whole - (rest == 0) - 1) as i:
                self._block((i + 1) * keys, keys, False, False)
        self._block(tirx.const((whole - (rest == 0)) * keys, "int32"), rest or keys, False, True)

    def _block(self, key: Expr, keys: int, is_first: bool, is_last: bool) -> None:
        """Queries against ``keys`` keys from ``key``; the last block writes the result."""
        self._scores(key, keys, is_first)
        self._exponentials(keys)
        if is_last:
            self._invert_total()
        self._values(key, keys, is_first, is_last)

    def _copy_queries(self) -> None:
        """The queries, scaled, side by side: rows of the packed form lie far apart and would share cache sets."""
        scale = emit.splat(self.work.scale, self.lanes, "float32")
        with emit.loop(self.work.head_size) as c:
            row = self._at(self.work.q, c)
            for v, start in enumerate(self.starts):
                self._set(self.query, v, emit.load(self.kernel.q, row + start, self.lanes) * scale, c)

    def _scores(self, key: Expr, keys: int, is_first: bool) -> None:
        """``scores[j, i]``, and the largest of each query so far; ``shrink`` is what that does to earlier sums."""
        if not is_first:
            before = self._buffer(1)
            for v in range(self.vectors):
                self._set(before, v, self._get(self.largest, v))

        def rows(j: Expr, count: int) -> None:
            def left(c: Expr, r: int) -> Expr:
                return self.kernel.k[self._at(self.work.k, c) + key + j + r]

            acc = self._product(count, self.work.head_size, left, self.query)
            for r in range(count):
                for v in range(self.vectors):
                    score = acc[r][v] + self._bias(key + j + r, v) if self.work.bias else acc[r][v]
                    self._set(self.scores, v, score, j + r)
                    # Either order is right: a NaN makes its own exponential NaN, whatever the maximum.
                    self._set(self.largest, v, emit.at_least(self._get(self.largest, v), score))

        self._in_quads(keys, rows)
        if not is_first:
            for v in range(self.vectors):
                shrink = emit.exp(self._get(before, v) - self._finite(self._get(self.largest, v)), self.lanes)
                self._set(self.shrink, v, shrink)
                self._set(self.total, v, self._get(self.total, v) * self._get(self.shrink, v))

    def _exponentials(self, keys: int) -> None:
        with emit.loop(keys) as j:
            for v in range(self.vectors):
                value = emit.exp(self._get(self.scores, v, j) - self._finite(self._get(self.largest, v)), self.lanes)
                self._set(self.scores, v, value, j)
                self._set(self.total, v, self._get(self.total, v) + self._get(self.scores, v, j))

    def _finite(self, largest: Expr) -> Expr:
        """-inf as a number: keys that are hidden up to here must not make NaN of those that follow."""
        return emit.at_least(largest, emit.splat(LOWEST, self.lanes, "float32"))

    def _invert_total(self) -> None:
        work = self.work
        factor = work.requantize.multiplier if work.requantize else 1.0
        hidden = emit.splat(0.0 if work.guarded else float("nan"), self.lanes, "float32")  # times the sum, for its NaN
        for v in range(self.vectors):
            inverse = emit.splat(factor, self.lanes, "float32") / self._get(self.total, v)
            is_hidden = self._get(self.largest, v) < emit.splat(LOWEST, self.lanes, "float32")
            self._set(self.total, v, tirx.Select(is_hidden, self._get(self.total, v) * hidden, inverse))

    def _values(self, key: Expr, keys: int, is_first: bool, is_last: bool) -> None:
        """``output[c, i]``: in the last block finished and stored, else kept for the next."""

        def rows(c: Expr, count: int) -> None:
            def left(j: Expr, r: int) -> Expr:
                return self.kernel.v[self._at(self.work.v, c + r) + key + j]

            def earlier(r: int, v: int) -> Expr:
                return self._get(self.output, v, c + r) * self._get(self.shrink, v)

            acc = self._product(count, keys, left, self.scores, None if is_first else earlier)
            for v in range(self.vectors):
                if not is_last:
                    for r in range(count):
                        self._set(self.output, v, acc[r][v], c + r)
                else:
                    inverse = self._get(self.total, v)
                    self._finish([acc[r][v] * inverse for r in range(count)], c, v)

        self._in_quads(self.work.value_size, rows)

    def _finish(self, values: list[Expr], channel: Expr, v: int) -> None:
        work, lanes = self.work, self.lanes
        row = self.head * work.value_size + channel
        column = self.batch * work.q.length + self.starts[v]
        if work.requantize is None:
            for r, value in enumerate(values):
                emit.store(self.kernel.y, (row + r) * work.q.positions + column, value, lanes)
        else:
            integers = [emit.round_to_int(value, 0, 255, work.requantize.zero_point, lanes) for value in values]
            word = emit.turn(emit.pack_bytes(integers, lanes), self.kernel.isa, lanes)
            emit.store(self.kernel.y, row // QUAD * work.q.positions + column, word, lanes)

    def _product(
        self,
        rows: int,
        depth: int,
        left: Callable[[Expr, int], Expr],
        right: Buffer,
        start: Callable[[int, int], Expr] | None = None,
    ) -> list[list[Expr]]:
        """``acc[r][i] = start(r, i) + sum over k of left(k, r) * right[k, i]``, in registers."""
        acc = emit.registers(rows * self.vectors, self.lanes, "float32")
        places = [(r, v, acc[r * self.vectors + v]) for r in range(rows) for v in range(self.vectors)]
        for r, v, register in places:
            emit.store(register, 0, start(r, v) if start else emit.splat(0.0, self.lanes, "float32"), self.lanes)
        with T.serial(0, depth) as k:
            operands = [emit.splat(left(k, r), self.lanes) for r in range(rows)]
            vectors = [self._get(right, v, k) for v in range(self.vectors)]
            for r, v, register in places:
                value = operands[r] * vectors[v] + emit.load(register, 0, self.lanes)
                emit.store(register, 0, value, self.lanes)
        loaded = [emit.load(register, 0, self.lanes) for register in acc]
        return [loaded[r * self.vectors : (r + 1) * self.vectors] for r in range(rows)]

    def _bias(self, key: Expr, v: int) -> Expr:
        bias = self.work.bias
        assert bias is not None
        batch = self.batch if bias.batch > 1 else 0
        plane = batch * bias.heads + (self.head if bias.heads > 1 else 0)
        column = key * bias.positions + plane * bias.queries
        if bias.queries == 1:
            return emit.splat(self.kernel.bias[column], self.lanes)
        return emit.load(self.kernel.bias, column + self.starts[v], self.lanes)

    def _in_quads(self, count: int, body: Callable[[Expr, int], None]) -> None:
        whole, rest = divmod(count, QUAD)
        if whole:
            with emit.loop(whole) as i:
                body(i * QUAD, QUAD)
        if rest:
            body(tirx.const(whole * QUAD, "int32"), rest)

    def _at(self, heads: Heads, channel: Expr) -> Expr:
        """Where this tile's sequence begins in the row of ``channel``."""
        return (heads.first + self.head * heads.stride + channel) * heads.positions + self.batch * heads.length

    def _buffer(self, rows: int) -> Buffer:
        return T.alloc_buffer((rows * self.width,), "float32", scope="global")

    def _get(self, buffer: Buffer, v: int, row: Expr | int = 0) -> Expr:
        return emit.load(buffer, row * self.width + v * self.lanes, self.lanes)

    def _set(self, buffer: Buffer, v: int, value: Expr, row: Expr | int = 0) -> None:
        emit.store(buffer, row * self.width + v * self.lanes, value, self.lanes)


_PARALLEL_WORK = 500_000  # multiply-adds below which waking the other threads costs more than it saves
