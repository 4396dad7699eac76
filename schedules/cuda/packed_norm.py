"""Layer norm and RMS norm on a GPU: the numbers of ``schedules/packed_norm.py``, some positions a block of threads.

The four parts of a sum are four threads' for each position; then all of the block's threads write.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD
from pumice.schedules.cuda.output import barrier, local
from pumice.schedules.emit import Expr
from pumice.schedules.packed_norm import PackedNorm
from pumice.targets.intrinsics import llvm
from pumice.targets.isa import Isa

POSITIONS = 16  # of a thread block
WORKERS = 16  # threads for each position


def cuda_packed_norm(work: PackedNorm, isa: Isa, name: str = "packed_norm") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""
    return emit.kernel(name, lambda: _Emitter(work).emit())


class _Emitter:
    """Emits one kernel; its fields are the kernel's arguments, thread indices and shared memory."""

    def __init__(self, work: PackedNorm) -> None:
        self.work = work

    def emit(self) -> None:
        work = self.work
        self.buffers = dict(zip(work.arguments, emit.arguments(**work.arguments), strict=True))
        with (
            T.launch_thread("blockIdx.x", -(-work.span // POSITIONS)) as tile,
            T.launch_thread("threadIdx.x", POSITIONS) as lane,
            T.launch_thread("threadIdx.y", WORKERS) as worker,
        ):
            self.lane, self.worker = lane, worker
            self.place = tile * POSITIONS + lane
            self.position = tirx.min(self.place, tirx.const(work.span - 1, "int32"))
            self.parts = T.alloc_buffer((QUAD * POSITIONS,), "float32", scope="shared")
            total, inverse = local("float32"), local("float32")
            T.buffer_store(total, _number(0.0), [0])
            if work.centres:
                T.buffer_store(total, self._sum(lambda part, x: part + x), [0])
                barrier()

            def centred(x: Expr) -> Expr:
                return emit.fma(total[0], _number(-1.0 / work.channels), x, 1) if work.centres else x

            def squared(part: Expr, x: Expr) -> Expr:
                return emit.fma(centred(x), centred(x), part, 1)

            squares = self._sum(squared)
            variance = emit.fma(squares, _number(1.0 / work.channels), _number(work.epsilon), 1)
            T.buffer_store(inverse, _number(1.0) / llvm("llvm.sqrt", "float32", variance), [0])
            self._write(lambda row: self._normalized(row, centred, inverse[0]))

    def _sum(self, add: Callable[[Expr, Expr], Expr]) -> Expr:
        """The rows of a position, reduced with ``add(part, x)`` in four parts."""
        work, part = self.work, local("float32")
        with T.If(self.worker < QUAD), T.Then():
            T.buffer_store(part, _number(0.0), [0])
            with T.serial(0, -(-work.channels // QUAD)) as quad:
                row = quad * QUAD + self.worker
                with T.If(row < work.channels), T.Then():
                    T.buffer_store(part, add(part[0], self._load(row)), [0])
            T.buffer_store(self.parts, part[0], [self.worker * POSITIONS + self.lane])
        barrier()
        first, second, third, fourth = (self.parts[r * POSITIONS + self.lane] for r in range(QUAD))
        return (first + second) + (third + fourth)

    def _load(self, row: Expr) -> Expr:
        return self.buffers["x"][row * self.work.positions + self.position]

    def _normalized(self, row: Expr, centred: Callable[[Expr], Expr], inverse: Expr) -> Expr:
        scaled, gamma = centred(self._load(row)) * inverse, self.buffers["gamma"][row]
        return emit.fma(scaled, gamma, self.buffers["beta"][row], 1) if self.work.centres else scaled * gamma

    def _write(self, value: Callable[[Expr], Expr]) -> None:
        """Quads of rows, every 16th by one worker."""
        work, quads = self.work, self.work.rows // QUAD
        values = local("float32", QUAD)
        with T.serial(0, -(-quads // WORKERS)) as turn:
            quad = turn * WORKERS + self.worker
            with T.If(tirx.all(quad < quads, self.place < work.span)), T.Then():
                for r in range(QUAD):
                    T.buffer_store(values, value(quad * QUAD + r), [r])
                    if work.writes_float:
                        to = (quad * QUAD + r) * work.positions + self.position
                        T.buffer_store(self.buffers["y"], values[r], [to])
                if work.multiplier is not None:
                    scaled = [values[r] * _number(work.multiplier) for r in range(QUAD)]
                    rounded = [emit.round_to_int(number, 0, 255, work.zero_point, 1) for number in scaled]
                    to = quad * work.positions + self.position
                    T.buffer_store(self.buffers["y_bytes"], emit.pack_bytes(rounded, 1), [to])


def _number(value: float) -> Expr:
    return tirx.const(value, "float32")
