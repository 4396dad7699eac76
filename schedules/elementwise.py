"""What touches each packed byte on its own: the sum of two tensors, and any function of one (a table)."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Add:
    """``clamp(round_half_even(fma(float(a - za), ma, float(b - zb) * mb)) + zero_point, low, high)`` in uint8.

    Arguments: a, b, y uint8 ``[words, 4]`` flat. Padding that holds za and zb comes out as ``zero_point``.
    """

    words: int
    a_zero_point: int
    a_multiplier: float
    b_zero_point: int
    b_multiplier: float
    zero_point: int
    low: int = 0
    high: int = 255
    threads: int = 1


def add(work: Add, isa: Isa, name: str = "add") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""

    def body() -> None:
        shape = (work.words, 4)
        a, b, y = emit.arguments(a=(shape, "uint8"), b=(shape, "uint8"), y=(shape, "uint8"))

        def centred(word: emit.Expr, byte: int, zero_point: int, lanes: int) -> emit.Expr:
            return emit.to_float(emit.byte_of(word, byte, lanes) - emit.splat(zero_point, lanes), lanes)

        def strip(at: emit.Expr, lanes: int) -> None:
            left, right = (emit.turn(emit.load(x, at, lanes), isa, lanes) for x in (a, b))
            values = []
            for byte in range(4):
                other = centred(right, byte, work.b_zero_point, lanes)
                other = other * emit.splat(work.b_multiplier, lanes, "float32")
                mine = centred(left, byte, work.a_zero_point, lanes)
                total = emit.fma(mine, emit.splat(work.a_multiplier, lanes, "float32"), other, lanes)
                values.append(emit.round_to_int(total, work.low, work.high, work.zero_point, lanes))
            emit.store(y, at, emit.turn(emit.pack_bytes(values, lanes), isa, lanes), lanes)

        chunk = 64 * isa.lanes
        whole, rest = divmod(work.words, chunk)
        parallel = work.threads > 1 and work.words > _PARALLEL_WORDS
        with emit.loop(whole + (rest > 0), parallel) as part:

            def strips(full: bool) -> None:
                emit.for_strips(chunk if full else rest, isa.lanes, lambda i, n: strip(part * chunk + i, n))

            emit.either(part < whole, whole, rest, strips)

    return emit.kernel(name, body)


def lookup(words: int, isa: Isa, name: str = "lookup") -> tirx.PrimFunc:
    """``y[i] = table[x[i]]``. Arguments: x uint8 ``[words, 4]``; table uint8 ``[256]``; y like x."""

    def body() -> None:
        x = emit.argument("x", (words, 4), "uint8")
        table = emit.argument("table", (256,), "uint8")
        y = emit.argument("y", (words, 4), "uint8")
        with emit.loop(words) as word:
            for byte in range(4):
                found = table[emit.turn_each(tirx.Cast("int32", x[word, byte]), isa, 1)]
                packed = found if not isa.sign else tirx.bitwise_xor(found, tirx.const(isa.sign, "uint8"))
                T.buffer_store(y, packed, [word, byte])

    return emit.kernel(name, body)


_PARALLEL_WORDS = 100_000  # below which waking the other threads costs more than it saves
