"""The kernel of a linear layer with one position, on a GPU: a matrix times a vector.

A warp has a quad of output rows; its threads take every 32nd block of their lists, so that weights and offsets are read
side by side and once, and at the end they add up what each has found.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD
from pumice.schedules.cuda.layer import CudaLayer
from pumice.schedules.cuda.output import Output, local, product
from pumice.schedules.cuda.tiling import WARP
from pumice.schedules.emit import Expr


class GemvEmitter:
    """Emits one kernel."""

    def __init__(self, work: CudaLayer) -> None:
        self.work = work
        self.acc_dtype = "int32" if work.dtype == "int8" else "float32"

    def emit(self) -> None:
        """Declare the arguments and write the body."""
        work, warps = self.work, self.work.tiling.warps
        self._declare()
        with (
            T.launch_thread("blockIdx.x", -(-work.quads // warps)) as group,
            T.launch_thread("threadIdx.x", WARP) as lane,
            T.launch_thread("threadIdx.y", warps) as warp,
        ):
            self.lane, self.quad = lane, tirx.min(group * warps + warp, work.quads - 1)
            self.acc = local(self.acc_dtype, QUAD)
            with T.unroll(0, QUAD) as row:
                T.buffer_store(self.acc, tirx.const(0, self.acc_dtype), [row])
            if work.is_dense:
                self._walk(self.quad * work.columns, work.columns, 0, QUAD)
            else:
                for row in range(0, QUAD, work.shared):
                    which = (self.quad * QUAD + row) // work.shared
                    self._walk(self.start[which], self.start[which + 1] - self.start[which], row, work.shared)
            self._add_up()
            with T.If(tirx.all(lane == 0, group * warps + warp < work.quads)), T.Then():
                self.output.store(self.quad, 0, lambda row: self.acc[row])

    def _declare(self) -> None:
        work = self.work
        x_dtype = "uint8" if work.dtype == "int8" else "float32"
        x = emit.argument("x", (work.source_rows, 1, work.depth), x_dtype)
        weight = emit.argument("weight", (work.blocks, work.shared, work.depth), work.dtype)
        self.offset = emit.argument("offset", (work.columns,), "int32")
        if not work.is_dense:
            self.start = emit.argument("start", (work.rows // work.shared + 1,), "int32")
        self.output = Output(work)
        self.x, self.weight = emit.words_of(x, self.acc_dtype), emit.words_of(weight, self.acc_dtype)

    def _walk(self, first: Expr, count: Expr | int, row0: int, shared: int) -> None:
        """A list of blocks for ``shared`` rows from ``row0`` on; dense, the offsets of every list are the same."""
        weights = local(self.acc_dtype, shared)
        with T.serial(0, tirx.floordiv(count + WARP - 1, WARP)) as turn:
            i = turn * WARP + self.lane
            with T.If(i < count), T.Then():
                emit.store(weights, 0, emit.load(self.weight, (first + i) * shared, shared), shared)
                x = self.x[self.offset[i if self.work.is_dense else first + i]]
                for r in range(shared):
                    T.buffer_store(self.acc, product(self.work, x, weights[r], self.acc[row0 + r]), [row0 + r])

    def _add_up(self) -> None:
        """Each row's sum over the warp, and its bias; every thread has it in the end."""
        with T.unroll(0, QUAD) as row:
            for distance in (16, 8, 4, 2, 1):
                mask = tirx.const(0xFFFFFFFF, "uint32")
                other = tirx.call_extern(self.acc_dtype, "__shfl_xor_sync", mask, self.acc[row], distance)
                T.buffer_store(self.acc, self.acc[row] + other, [row])
            T.buffer_store(self.acc, self.acc[row] + self.output.bias[self.quad * QUAD + row], [row])
