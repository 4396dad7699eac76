"""Pooling on the packed form: windows (maximum, average) and the mean of a whole map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.geometry import Geometry
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Pooling:
    """A window over each channel; ``offsets`` are those of its taps, as for a convolution.

    Arguments: x ``[rows * phases, P of source, depth]``; mask int32 ``[P]`` (padded target only); y likewise.
    For ``average`` in uint8: ``round_half_even(float(sum of (x - zero_point)) * multiplier) + output_zero_point``; in
    float32 ``sum * multiplier``. For ``maximum`` the numbers stay as they are, and must be at least ``fill``.
    """

    kind: str  # maximum or average
    dtype: str  # uint8 or float32
    rows: int
    phases: int
    source: Geometry
    target: Geometry
    offsets: tuple[int, ...]
    zero_point: int = 0
    multiplier: float = 1.0
    output_zero_point: int = 0
    threads: int = 1

    @property
    def depth(self) -> int:
        """Channels in a word."""
        return 4 if self.dtype == "uint8" else 1


def pooling(work: Pooling, isa: Isa, name: str = "pooling") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""

    def body() -> None:
        lanes, target = isa.lanes, work.target
        word = "int32" if work.dtype == "uint8" else "float32"
        x_shape = (work.rows * work.phases, work.source.positions, work.depth)
        x_bytes = emit.argument("x", x_shape, work.dtype)
        mask = emit.argument("mask", (target.positions,), "int32") if target.is_padded else None
        y = emit.words_of(emit.argument("y", (work.rows, target.positions, work.depth), work.dtype), word)
        x = emit.words_of(x_bytes, word)
        vectors = -(-target.span // lanes)
        padding = emit.packed_word(work.output_zero_point, isa) if work.dtype == "uint8" else 0.0
        parallel = work.threads > 1 and work.rows * vectors * len(work.offsets) > _PARALLEL_WORK
        with emit.loop(work.rows, parallel) as row:
            out = row * target.positions
            if mask is not None:
                end = target.base + vectors * lanes
                emit.fill(y, out, target.base, padding, word, lanes)
                emit.fill(y, out + end, target.positions - end, padding, word, lanes)
            with emit.loop(vectors) as v:
                position = v * lanes + target.base
                start = row * (work.phases * work.source.positions) + position
                value = (_maximum if work.kind == "maximum" else _average)(work, isa, x, start)
                if mask is not None:
                    inside = emit.load(mask, position, lanes) != emit.splat(0, lanes)
                    value = tirx.Select(inside, value, emit.splat(padding, lanes, word))
                emit.store(y, out + position, value, lanes)

    return emit.kernel(name, body)


def _maximum(work: Pooling, isa: Isa, x: Buffer, start: Expr) -> Expr:
    """Bytes compare as bytes, four channels at once."""
    lanes = isa.lanes
    as_bytes = f"{'int8' if isa.sign else 'uint8'}x{4 * lanes}"
    best = None
    for offset in work.offsets:
        value = emit.load(x, start + offset, lanes)
        if work.dtype == "uint8":
            value = tirx.reinterpret(as_bytes, value)
        best = value if best is None else tirx.max(best, value)
    return tirx.reinterpret(emit.vector("int32", lanes), best) if work.dtype == "uint8" else best


def _average(work: Pooling, isa: Isa, x: Buffer, start: Expr) -> Expr:
    lanes = isa.lanes
    sums: list[Expr] = [None] * work.depth
    for offset in work.offsets:
        word = emit.load(x, start + offset, lanes)
        word = emit.turn(word, isa, lanes) if work.dtype == "uint8" else word
        for byte in range(work.depth):
            value = emit.byte_of(word, byte, lanes) if work.dtype == "uint8" else word
            sums[byte] = value if sums[byte] is None else sums[byte] + value
    if work.dtype == "float32":
        return sums[0] * emit.splat(work.multiplier, lanes, "float32")
    count = len(work.offsets)
    return emit.turn(emit.pack_bytes([_requantize(work, total, count, lanes) for total in sums], lanes), isa, lanes)


def _requantize(work: Pooling | GlobalAverage, total: Expr, count: int, lanes: int) -> Expr:
    centred = total - emit.splat(work.zero_point * count, lanes)
    scaled = emit.to_float(centred, lanes) * emit.splat(work.multiplier, lanes, "float32")
    return emit.round_to_int(scaled, 0, 255, work.output_zero_point, lanes)


@dataclass(frozen=True)
class GlobalAverage:
    """The mean of each map. Arguments: x ``[rows, P of source, depth]``; y ``[rows, P of target, depth]``.

    uint8: ``round_half_even(float(sum of (x - zero_point)) * multiplier) + output_zero_point``; float32:
    ``sum * multiplier``. The padding of x must hold its zero point; it then adds nothing.
    """

    dtype: str
    rows: int
    source: Geometry
    target: Geometry  # batch x 1 x 1
    zero_point: int = 0
    multiplier: float = 1.0
    output_zero_point: int = 0

    @property
    def depth(self) -> int:
        """Channels in a word."""
        return 4 if self.dtype == "uint8" else 1


def global_average(work: GlobalAverage, isa: Isa, name: str = "global_average") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""

    def body() -> None:
        word = "int32" if work.dtype == "uint8" else "float32"
        source, target = work.source, work.target
        x, y = emit.arguments(
            x=((work.rows, source.positions, work.depth), work.dtype),
            y=((work.rows, target.positions, work.depth), work.dtype),
        )
        count = (source.height - 1) * source.pitch + source.width
        with emit.loop(work.rows) as row:
            if target.is_padded:
                fill = emit.packed_word(work.output_zero_point, isa) if work.dtype == "uint8" else 0.0
                emit.fill(y, row * target.positions, target.positions, fill, word, isa.lanes)
            with emit.loop(source.batch) as image:
                start = row * source.positions + source.base + image * source.image
                sums = _sum_words(work, isa, x, start, count)
                to = row * target.positions + target.base + image * target.image
                if work.dtype == "uint8":
                    value = emit.pack_bytes([_requantize(work, total, count, 1) for total in sums], 1)
                    value = emit.turn(value, isa, 1)
                else:
                    value = sums[0] * tirx.const(np.float32(work.multiplier), "float32")
                T.buffer_store(y, value, [to])

    return emit.kernel(name, body)


def _sum_words(work: GlobalAverage, isa: Isa, x: Buffer, start: Expr, count: int) -> list[Expr]:
    """The sum of each channel of ``count`` words: whole vectors, then the rest one by one."""
    lanes, dtype = isa.lanes, "int32" if work.dtype == "uint8" else "float32"
    zero: int | float = 0 if work.dtype == "uint8" else 0.0
    wide = T.alloc_buffer((work.depth * lanes,), dtype, scope="global")
    for channel in range(work.depth):
        emit.store(wide, channel * lanes, emit.splat(zero, lanes, dtype), lanes)

    def add(offset: Expr, n: int) -> None:
        value = emit.load(x, start + offset, n)
        value = emit.turn(value, isa, n) if work.dtype == "uint8" else value
        for channel in range(work.depth):
            old = emit.load(wide, channel * lanes, n)
            part = emit.byte_of(value, channel, n) if work.dtype == "uint8" else value
            emit.store(wide, channel * lanes, old + part, n)

    emit.for_strips(count, lanes, add)
    sums = T.alloc_buffer((work.depth,), dtype, scope="global")
    for channel in range(work.depth):
        vector = emit.load(wide, channel * lanes, lanes)
        total = emit.across("add" if work.dtype == "uint8" else "fadd", vector, lanes)
        T.buffer_store(sums, total, [channel])
    return [sums[channel] for channel in range(work.depth)]


_PARALLEL_WORK = 20_000  # vector operations below which waking the other threads costs more than it saves
