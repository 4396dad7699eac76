"""Layer norm and RMS norm over the channels of packed float32: down the rows, every lane a position of its own.

Sums run in four parts, by row modulo four, and every product that is added is an explicit fused multiply-add: the
result is the same on every target, bit for bit, however the positions are cut into tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD
from pumice.schedules.emit import Buffer, Expr
from pumice.targets.intrinsics import llvm
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class PackedNorm:
    """``y = (x - mean) / sqrt(var + epsilon) * gamma + beta``, two passes (Ba et al., arXiv 1607.06450).

    Without ``centres``, ``y = x / sqrt(mean(x^2) + epsilon) * gamma`` (Zhang, Sennrich, arXiv 1910.07467).

    Arguments: x float32 ``[rows, P, 1]``; gamma float32 ``[rows]``; beta likewise (if it centres); y like x (if
    ``writes_float``); y in bytes ``clamp(round_half_even(y * multiplier) + zero_point, 0, 255)``, uint8
    ``[rows/4, P, 4]`` (if ``multiplier`` is given). ``rows`` are the channels up to a multiple of four; what the last
    ones hold is not read.
    """

    channels: int
    positions: int  # of a row: a multiple of the lanes
    span: int  # that hold data; vectors beyond them are not written
    epsilon: float
    centres: bool
    writes_float: bool
    multiplier: float | None = None
    zero_point: int = 0
    threads: int = 1

    @property
    def rows(self) -> int:
        """Rows of the packed tensor."""
        return -(-self.channels // QUAD) * QUAD

    @property
    def arguments(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and data types of the kernel's arguments, by name."""
        shape, quads = (self.rows, self.positions, 1), (self.rows // QUAD, self.positions, QUAD)
        specs: dict[str, tuple[tuple[int, ...], str]] = {"x": (shape, "float32"), "gamma": ((self.rows,), "float32")}
        specs |= {"beta": ((self.rows,), "float32")} if self.centres else {}
        specs |= {"y": (shape, "float32")} if self.writes_float else {}
        return specs | ({"y_bytes": (quads, "uint8")} if self.multiplier is not None else {})


def packed_norm(work: PackedNorm, isa: Isa, name: str = "packed_norm") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""
    return emit.kernel(name, lambda: _Emitter(work, isa).emit())


class _Emitter:
    """Emits one kernel; its fields are the kernel's arguments."""

    def __init__(self, work: PackedNorm, isa: Isa) -> None:
        self.work, self.isa, self.lanes = work, isa, isa.lanes
        self.largest = isa.registers // 8  # vectors in a tile: four sums each, and room for the rest

    def emit(self) -> None:
        work = self.work
        self.buffers = dict(zip(work.arguments, emit.arguments(**work.arguments), strict=True))
        whole, rest = divmod(-(-work.span // self.lanes), self.largest)
        parallel = work.threads > 1 and work.rows * work.span > _PARALLEL_SIZE
        with emit.loop(whole + (rest > 0), parallel) as tile:
            position = tile * self.largest * self.lanes
            emit.either(tile < whole, whole, rest, lambda full: self._tile(position, self.largest if full else rest))

    def _tile(self, position: Expr, vectors: int) -> None:
        """All channels of ``vectors`` vectors of positions."""
        work, lanes = self.work, self.lanes
        share = emit.splat(1.0 / work.channels, lanes, "float32")
        total = T.alloc_buffer((vectors * lanes,), "float32", scope="global")
        if work.centres:
            self._sum(total, position, vectors, lambda part, x, v: part + x)

        def centred(x: Expr, v: int) -> Expr:
            minus_share = emit.splat(-1.0 / work.channels, lanes, "float32")
            return emit.fma(emit.load(total, v * lanes, lanes), minus_share, x, lanes) if work.centres else x

        def squared(part: Expr, x: Expr, v: int) -> Expr:
            return emit.fma(centred(x, v), centred(x, v), part, lanes)

        inverse = T.alloc_buffer((vectors * lanes,), "float32", scope="global")
        self._sum(inverse, position, vectors, squared)
        for v in range(vectors):
            epsilon = emit.splat(work.epsilon, lanes, "float32")
            variance = emit.fma(emit.load(inverse, v * lanes, lanes), share, epsilon, lanes)
            root = llvm("llvm.sqrt", emit.vector("float32", lanes), variance)
            emit.store(inverse, v * lanes, emit.splat(1.0, lanes, "float32") / root, lanes)

        def normalized(row: Expr, v: int) -> Expr:
            x = emit.load(self.buffers["x"], row * work.positions + position + v * lanes, lanes)
            scaled = centred(x, v) * emit.load(inverse, v * lanes, lanes)
            gamma = emit.splat(self.buffers["gamma"][row], lanes)
            if not work.centres:
                return scaled * gamma
            return emit.fma(scaled, gamma, emit.splat(self.buffers["beta"][row], lanes), lanes)

        with emit.loop(work.rows // QUAD) as quad:
            for v in range(vectors):
                self._write(quad, position + v * lanes, [normalized(quad * QUAD + r, v) for r in range(QUAD)])

    def _sum(self, out: Buffer, position: Expr, vectors: int, add: Callable[[Expr, Expr, int], Expr]) -> None:
        """Reduce the rows of each vector with ``add(part, x, vector)``, in four parts."""
        work, lanes = self.work, self.lanes
        parts = emit.registers(QUAD * vectors, lanes, "float32")
        for part in parts:
            emit.store(part, 0, emit.splat(0.0, lanes, "float32"), lanes)

        def rows(first: Expr, count: int) -> None:
            for r in range(count):
                for v in range(vectors):
                    part = parts[r * vectors + v]
                    x = emit.load(self.buffers["x"], (first + r) * work.positions + position + v * lanes, lanes)
                    emit.store(part, 0, add(emit.load(part, 0, lanes), x, v), lanes)

        quads, rest = divmod(work.channels, QUAD)
        if quads:
            with emit.loop(quads) as quad:
                rows(quad * QUAD, QUAD)
        rows(tirx.const(quads * QUAD, "int32"), rest)
        for v in range(vectors):
            part = [emit.load(parts[r * vectors + v], 0, lanes) for r in range(QUAD)]
            emit.store(out, v * lanes, (part[0] + part[1]) + (part[2] + part[3]), lanes)

    def _write(self, quad: Expr, position: Expr, values: list[Expr]) -> None:
        work, lanes = self.work, self.lanes
        staged = T.alloc_buffer((QUAD * lanes,), "float32", scope="global")
        for r, value in enumerate(values):
            emit.store(staged, r * lanes, value, lanes)
            if work.writes_float:
                row = (quad * QUAD + r) * work.positions
                emit.store(self.buffers["y"], row + position, emit.load(staged, r * lanes, lanes), lanes)
        if work.multiplier is not None:
            multiplier = emit.splat(work.multiplier, lanes, "float32")
            scaled = [emit.load(staged, r * lanes, lanes) * multiplier for r in range(QUAD)]
            rounded = [emit.round_to_int(value, 0, 255, work.zero_point, lanes) for value in scaled]
            word = emit.turn(emit.pack_bytes(rounded, lanes), self.isa, lanes)
            emit.store(self.buffers["y_bytes"], quad * work.positions + position, word, lanes)


_PARALLEL_SIZE = 100_000  # elements below which waking the other threads costs more than it saves
