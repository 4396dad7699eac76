"""Attention of several heads on a GPU: the numbers of ``schedules/attention.py``, a thread block for a tile of queries.

    scores:  each worker takes every 8th quad of keys    S[j, i] = scale * sum over c of K[c, j] * Q[c, i] + bias[j, i]
    powers:  the same keys                               S[j, i] = exp(S[j, i] - the largest of query i)
    values:  each worker takes every 8th quad of channels    O[c, i] = sum over j of V[c, j] * S[j, i] / their sum

The scores of a block of keys wait in shared memory. Neighbouring threads have neighbouring queries; the largest score
and the sum of the powers every thread finds for its query by itself, in the order of the keys: so the result does not
depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.attention import KEYS, LOWEST, QUAD, Attention, Heads
from pumice.schedules.cuda.output import barrier, local
from pumice.schedules.cuda.tiling import SHARED_LIMIT
from pumice.schedules.emit import Buffer, Expr
from pumice.targets.isa import Isa

QUERIES = 16  # of a thread block
WORKERS = 8  # threads for each query


def fits(work: Attention) -> bool:
    """Whether the queries and scores of a tile leave room in a thread block's shared memory."""
    return 4 * QUERIES * (work.head_size + KEYS) <= SHARED_LIMIT


def cuda_attention(work: Attention, isa: Isa, name: str = "attention") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""
    return emit.kernel(name, lambda: _Emitter(work).emit())


class _Emitter:
    """Emits one kernel; its fields are the kernel's arguments, thread indices, shared memory and registers."""

    def __init__(self, work: Attention) -> None:
        self.work = work
        self.keys = -(-work.k.length // -(-work.k.length // KEYS))
        self.keys += -self.keys % QUAD
        self.quads = -(-work.value_size // QUAD)  # of output channels
        self.turns = -(-self.quads // WORKERS)  # that a worker takes them in

    def emit(self) -> None:
        work = self.work
        self._declare()
        with (
            T.launch_thread("blockIdx.x", -(-work.q.length // QUERIES)) as tile,
            T.launch_thread("blockIdx.y", work.batch * work.heads) as unit,
            T.launch_thread("threadIdx.x", QUERIES) as lane,
            T.launch_thread("threadIdx.y", WORKERS) as worker,
        ):
            self.lane, self.worker = lane, worker
            self.batch, self.head = unit // work.heads, unit % work.heads
            self.place = tile * QUERIES + lane
            self.query = tirx.min(self.place, tirx.const(work.q.length - 1, "int32"))  # beyond the last: the last again
            self.queries = T.alloc_buffer((work.head_size * QUERIES,), "float32", scope="shared")
            self.scores = T.alloc_buffer((self.keys * QUERIES,), "float32", scope="shared")
            self.largest, self.total, self.shrink = (local("float32") for _ in range(3))
            self.output = local("float32", self.turns * QUAD)
            self._start()
            whole, rest = divmod(work.k.length, self.keys)
            with emit.loop(whole) as block:
                self._block(block * self.keys, self.keys)
            if rest:
                self._block(tirx.const(whole * self.keys, "int32"), rest)
            self._finish()
            self._fill_rest(tile, unit)

    def _declare(self) -> None:
        work = self.work
        specs = {n: ((h.rows, h.positions, 1), "float32") for n, h in (("q", work.q), ("k", work.k), ("v", work.v))}
        if work.bias is not None:
            specs["bias"] = ((work.bias.rows, work.bias.positions, 1), "float32")
        specs["y"] = (work.output_shape, "uint8" if work.requantize else "float32")
        self.q, self.k, self.v, *bias, self.y = emit.arguments(**specs)
        self.bias: Buffer = bias[0] if bias else None

    def _start(self) -> None:
        """The scaled queries, side by side."""
        T.buffer_store(self.largest, _number(float("-inf")), [0])
        T.buffer_store(self.total, _number(0.0), [0])
        with T.unroll(0, self.turns * QUAD) as i:
            T.buffer_store(self.output, _number(0.0), [i])

        def copy(c: Expr) -> None:
            value = self.q[self._at(self.work.q, c) + self.query] * _number(self.work.scale)
            T.buffer_store(self.queries, value, [c * QUERIES + self.lane])

        self._in_turns(self.work.head_size, copy)
        barrier()

    def _block(self, first: Expr, keys: int) -> None:
        """All queries of the tile against ``keys`` keys from ``first``."""
        self._in_turns(-(-keys // QUAD), lambda quad: self._scores(first, quad * QUAD, keys))
        barrier()
        self._find_largest(keys)
        barrier()

        def power(j: Expr) -> None:
            score = self.scores[j * QUERIES + self.lane]
            T.buffer_store(self.scores, emit.exp(score - self._finite(), 1), [j * QUERIES + self.lane])

        self._in_turns(keys, power)
        barrier()
        with T.serial(0, keys) as j:
            T.buffer_store(self.total, self.total[0] + self.scores[j * QUERIES + self.lane], [0])
        self._values(first, keys)
        barrier()

    def _scores(self, first: Expr, j: Expr, keys: int) -> None:
        """A quad of keys; the last ones may not be there."""
        acc = local("float32", QUAD)
        columns = [self._within(j + r, keys) for r in range(QUAD)]
        for r in range(QUAD):
            T.buffer_store(acc, _number(0.0), [r])
        with T.serial(0, self.work.head_size) as c:
            row = self._at(self.work.k, c) + first
            for r, column in enumerate(columns):
                product = emit.fma(self.k[row + column], self.queries[c * QUERIES + self.lane], acc[r], 1)
                T.buffer_store(acc, product, [r])
        for r, column in enumerate(columns):
            score = acc[r] if self.work.bias is None else acc[r] + self._bias(column + first)
            T.buffer_store(self.scores, score, [column * QUERIES + self.lane])

    def _find_largest(self, keys: int) -> None:
        """The largest score so far, and what that does to earlier sums."""
        before = local("float32")
        T.buffer_store(before, self.largest[0], [0])
        with T.serial(0, keys) as j:
            T.buffer_store(self.largest, emit.at_least(self.largest[0], self.scores[j * QUERIES + self.lane]), [0])
        T.buffer_store(self.shrink, emit.exp(before[0] - self._finite(), 1), [0])
        T.buffer_store(self.total, self.total[0] * self.shrink[0], [0])

    def _finite(self) -> Expr:
        """The largest score, -inf as a number: keys that are hidden up to here must not make NaN of what follows."""
        return emit.at_least(self.largest[0], _number(LOWEST))

    def _values(self, first: Expr, keys: int) -> None:
        with T.unroll(0, self.turns) as turn:
            quad = self._quad(turn)
            last = tirx.const(self.work.value_size - 1, "int32")
            rows = [self._at(self.work.v, tirx.min(quad * QUAD + r, last)) for r in range(QUAD)]
            for r in range(QUAD):
                T.buffer_store(self.output, self.output[turn * QUAD + r] * self.shrink[0], [turn * QUAD + r])
            with T.serial(0, keys) as j:
                for r, row in enumerate(rows):
                    place = turn * QUAD + r
                    power = self.scores[j * QUERIES + self.lane]
                    T.buffer_store(
                        self.output, emit.fma(self.v[row + first + j], power, self.output[place], 1), [place]
                    )

    def _finish(self) -> None:
        """Divide by the sum, and store."""
        work = self.work
        inverse = local("float32")
        quotient = _number(work.requantize.multiplier if work.requantize else 1.0) / self.total[0]
        hidden = self.total[0] * _number(0.0 if work.guarded else float("nan"))
        T.buffer_store(inverse, tirx.Select(self.largest[0] < _number(LOWEST), hidden, quotient), [0])
        column = self.batch * work.q.length + self.place
        with T.unroll(0, self.turns) as turn:
            quad = self._quad(turn)
            with T.If(tirx.all(self.place < work.q.length, quad < self.quads)), T.Then():
                values = [self.output[turn * QUAD + r] * inverse[0] for r in range(QUAD)]
                row = self.head * work.value_size + quad * QUAD
                if work.requantize is not None:
                    integers = [emit.round_to_int(value, 0, 255, work.requantize.zero_point, 1) for value in values]
                    T.buffer_store(self.y, emit.pack_bytes(integers, 1), [row // QUAD * work.q.positions + column])
                    return
                for r, value in enumerate(values):
                    with T.If(quad * QUAD + r < work.value_size), T.Then():
                        T.buffer_store(self.y, value, [(row + r) * work.q.positions + column])

    def _fill_rest(self, tile: Expr, unit: Expr) -> None:
        """Channels that only fill up the last word."""
        work = self.work
        end = work.heads * work.value_size * work.q.positions
        rest = work.output_shape[0] * work.output_shape[1] - end
        if work.requantize is None and rest > 0:
            with T.If(tirx.all(tile == 0, unit == 0, self.lane == 0)), T.Then():
                self._in_turns(rest, lambda i: T.buffer_store(self.y, _number(0.0), [end + i]))

    def _bias(self, key: Expr) -> Expr:
        bias = self.work.bias
        assert bias is not None
        batch = self.batch if bias.batch > 1 else 0
        plane = batch * bias.heads + (self.head if bias.heads > 1 else 0)
        column = key * bias.positions + plane * bias.queries
        return self.bias[column if bias.queries == 1 else column + self.query]

    def _in_turns(self, count: int, body: Callable[[Expr], None]) -> None:
        """``body(i)`` for ``count`` numbers, every 8th of them by one worker."""
        with T.serial(0, -(-count // WORKERS)) as turn:
            i = turn * WORKERS + self.worker
            with T.If(i < count), T.Then():
                body(i)

    def _within(self, index: Expr, count: int) -> Expr:
        return index if count % QUAD == 0 else tirx.min(index, tirx.const(count - 1, "int32"))

    def _quad(self, turn: Expr) -> Expr:
        """A worker's quad of channels; beyond the last, what is computed is not stored."""
        return turn * WORKERS + self.worker

    def _at(self, heads: Heads, channel: Expr) -> Expr:
        """Where the block's sequence begins in the row of ``channel``."""
        return (heads.first + self.head * heads.stride + channel) * heads.positions + self.batch * heads.length


def _number(value: float) -> Expr:
    return tirx.const(value, "float32")
