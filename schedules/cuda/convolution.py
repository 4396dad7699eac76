"""The kernel of every layer with many positions, on a GPU: linear, 1x1 and k x k convolution, grouped, depthwise.

    Y[n, p] = epilogue(bias[n] + sum over j of W[j] . X[offset[j] + p])

A thread block copies what a tile of the reduction needs into shared memory: rows of the input with all positions that
its taps read, and the blocks of its output rows. Neighbouring threads have neighbouring positions, so that all they
read of the input is side by side, and what they read of the weights is the same for a warp. Sparse, a warp walks the
lists of its rows; dense, it walks the columns and each word of the input serves all its rows.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD
from pumice.schedules.cuda.layer import CudaLayer
from pumice.schedules.cuda.output import Output, barrier, local, product
from pumice.schedules.cuda.staging import InputTile
from pumice.schedules.cuda.tiling import WARP, entry_words
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.geometry import LANES


class ConvolutionEmitter:
    """Emits one kernel; its fields are the kernel's arguments, thread indices, shared memory and registers."""

    def __init__(self, work: CudaLayer) -> None:
        work.check()
        self.work, self.tiling, self.slab = work, work.tiling, work.slab
        self.acc_dtype = "int32" if work.dtype == "int8" else "float32"
        span = work.places.target.span
        self.position_tiles = -(-span // self.tiling.positions)
        self.groups = -(-work.quads // self.tiling.block_quads)
        self.end = work.places.target.base + -(-span // LANES) * LANES  # of what is computed, whole vectors of a CPU

    def emit(self) -> None:
        """Declare the arguments and write the body."""
        work = self.work
        self._declare()
        with (
            T.launch_thread("blockIdx.x", self.groups) as group,
            T.launch_thread("blockIdx.y", self.position_tiles) as tile,
            T.launch_thread("threadIdx.x", WARP) as lane,
            T.launch_thread("threadIdx.y", self.tiling.warps) as warp,
        ):
            self.tile, self.lane, self.warp = tile, lane, warp
            self.first_quad = group * self.tiling.block_quads
            self.position = work.places.target.base + tile * self.tiling.positions
            phases = self.slab.phases
            tile_rows = min(self.tiling.words, work.words) * phases
            copied = InputTile(work.places.source, self.slab, work.words * phases, tile_rows)
            self.input = self.x
            if work.copies_input:
                self.input = T.alloc_buffer((work.slab_words,), self.acc_dtype, scope="shared")
            self.lists = T.alloc_buffer((work.list_words,), "int32", scope="shared")
            self.acc = local(self.acc_dtype, self.tiling.quads * QUAD * self.tiling.vectors)
            self.copied = local("int32", 2)  # the first block that is copied, and the end
            self._start()
            with emit.loop(work.tiles) as step:
                if work.copies_input:
                    copied.copy(self.x, self.input, step, self.position, warp, lane, self.tiling.warps)
                count = self._copy_columns(step) if work.is_dense else None
                if count is None:
                    self._copy_lists(step)
                barrier()
                if count is None:
                    self._walk_lists(step)
                else:
                    self._walk_columns(step, count)
                if work.tiles > 1:
                    barrier()
            self._finish()

    def _declare(self) -> None:
        work, source = self.work, self.work.places.source
        x_dtype = "uint8" if work.dtype == "int8" else "float32"
        x = emit.argument("x", (work.source_rows, source.positions, work.depth), x_dtype)
        weight = emit.argument("weight", (work.blocks, work.shared, work.depth), work.dtype)
        self.offset = emit.argument("offset", (work.columns,), "int32")
        if not work.is_dense:
            self.start = emit.argument("start", (work.tiles * (work.rows // work.shared) + 1,), "int32")
        self.output = Output(work)
        self.x, self.weight = emit.words_of(x, self.acc_dtype), emit.words_of(weight)

    def _start(self) -> None:
        """Every accumulator starts at its row's bias."""
        with T.unroll(0, self.tiling.quads) as q, T.unroll(0, QUAD) as row, T.unroll(0, self.tiling.vectors) as v:
            quad = tirx.min(self._quad(q), self.work.quads - 1)
            T.buffer_store(self.acc, self.output.bias[quad * QUAD + row], [self._register(q, row, v)])

    def _copy_columns(self, step: Expr) -> Expr:
        """Weights and offsets of all columns of the tile; gives how many there are."""
        work = self.work
        begin = step * work.tile_columns
        count = tirx.min(tirx.const(work.tile_columns, "int32"), work.columns - begin)
        quads = tirx.min(tirx.const(self.tiling.block_quads, "int32"), work.quads - self.first_quad)
        first = begin * work.quads + self.first_quad * count

        def copy_block(i: Expr) -> None:
            words = emit.load(self.weight, (first + i) * QUAD, QUAD)
            emit.store(self.lists, i * QUAD, words, QUAD)

        offsets = work.capacity * QUAD  # behind the weights, whose vectors want alignment
        self._for_threads(count, lambda i: T.buffer_store(self.lists, self.offset[begin + i], [offsets + i]))
        self._for_threads(quads * count, copy_block)
        return count

    def _walk_columns(self, step: Expr, count: Expr) -> None:
        """A column: one offset, the words of the input, and for each quad four weights."""
        tiling = self.tiling
        x, w = local(self.acc_dtype, tiling.vectors), local("int32", QUAD)
        last = tirx.min(tirx.const(tiling.block_quads, "int32"), self.work.quads - self.first_quad) - 1
        with T.serial(0, count, annotations=_UNROLLED) as column:
            self._load_input(x, step, self.lists[self.work.capacity * QUAD + column])
            with T.unroll(0, tiling.quads) as q:
                quad = tirx.min(self.warp * tiling.quads + q, last)
                emit.store(w, 0, emit.load(self.lists, (quad * count + column) * QUAD, QUAD), QUAD)
                self._multiply(x, w, q, 0, QUAD)

    def _copy_lists(self, step: Expr) -> None:
        """The lists of the block's rows, which lie side by side; of each block the weights and then the offset."""
        shared, entry = self.work.shared, entry_words(self.work.shared)
        self._find_lists(self.copied, step, 0, self.tiling.block_quads * QUAD // shared)

        def copy_block(i: Expr) -> None:
            weights = emit.load(self.weight, (self.copied[0] + i) * shared, shared)
            emit.store(self.lists, i * entry, weights, shared)
            T.buffer_store(self.lists, self.offset[self.copied[0] + i], [i * entry + shared])

        self._for_threads(self.copied[1] - self.copied[0], copy_block)

    def _walk_lists(self, step: Expr) -> None:
        """A block: its weights and offset by one load (4x4: two), and the words of the input."""
        work, shared, entry = self.work, self.work.shared, entry_words(self.work.shared)
        x, block, walked = local(self.acc_dtype, self.tiling.vectors), local("int32", QUAD), local("int32", 2)
        loaded, each = min(entry, QUAD), QUAD // shared
        with (
            T.unroll(0, self.tiling.quads) as q,
            T.If(self._quad(q) < work.quads),
            T.Then(),
            T.unroll(0, each) as which,
        ):
            self._find_lists(walked, step, (self.warp * self.tiling.quads + q) * each + which, 1)
            with T.serial(0, walked[1] - walked[0], annotations=_UNROLLED) as i:
                place = (walked[0] - self.copied[0] + i) * entry
                emit.store(block, 0, emit.load(self.lists, place, loaded), loaded)
                self._load_input(x, step, block[shared] if shared < loaded else self.lists[place + shared])
                self._multiply(x, block, q, which * shared, shared)

    def _find_lists(self, limits: Buffer, step: Expr, which: Expr | int, count: int) -> None:
        """Where ``count`` lists of a tile start and end, from the thread block's list ``which`` on."""
        lists = self.work.rows // self.work.shared
        first = self.first_quad * (QUAD // self.work.shared) + which
        end = tirx.min(first + count, tirx.const(lists, "int32")) if count > 1 else first + 1
        T.buffer_store(limits, self.start[step * lists + first], [0])
        T.buffer_store(limits, self.start[step * lists + end], [1])

    def _load_input(self, x: Buffer, step: Expr, offset: Expr) -> None:
        """Where it is not copied, positions that are not computed read the last one's words."""
        work = self.work
        first = step * self.tiling.words * self.slab.phases * self.slab.pitch
        with T.unroll(0, self.tiling.vectors) as v:
            place = offset + self.lane + v * WARP
            if not work.copies_input:
                place = first + offset + tirx.min(self.position + self.lane + v * WARP, self.end - 1)
            T.buffer_store(x, self.input[place], [v])

    def _multiply(self, x: Buffer, w: Buffer, q: Expr, row0: Expr | int, rows: int) -> None:
        with T.unroll(0, rows) as r, T.unroll(0, self.tiling.vectors) as v:
            place = self._register(q, row0 + r, v)
            weight = w[r] if self.work.dtype == "int8" else tirx.reinterpret("float32", w[r])
            T.buffer_store(self.acc, product(self.work, x[v], weight, self.acc[place]), [place])

    def _finish(self) -> None:
        work, target = self.work, self.work.places.target
        with T.unroll(0, self.tiling.quads) as q, T.If(self._quad(q) < work.quads), T.Then():
            quad = self._quad(q)
            with T.unroll(0, self.tiling.vectors) as v:
                position = self.position + v * WARP + self.lane
                with T.If(position < self.end), T.Then():
                    self.output.store(quad, position, lambda row: self.acc[self._register(q, row, v)])
            if not target.is_padded:
                return
            for tile, first, end in ((0, 0, target.base), (self.position_tiles - 1, self.end, target.positions)):
                with T.If(self.tile == tile), T.Then():
                    self.output.fill(quad, first, end, self.lane, WARP)

    def _for_threads(self, count: Expr, body: Callable[[Expr], None]) -> None:
        """``body(i)`` for ``count`` numbers, shared out to the block's threads."""
        threads = self.tiling.threads
        with T.serial(0, tirx.floordiv(count + threads - 1, threads)) as turn:
            i = turn * threads + self.warp * WARP + self.lane
            with T.If(i < count), T.Then():
                body(i)

    def _quad(self, q: Expr | int) -> Expr:
        return self.first_quad + self.warp * self.tiling.quads + q

    def _register(self, q: Expr | int, row: Expr | int, v: Expr | int) -> Expr:
        return (q * QUAD + row) * self.tiling.vectors + v


_UNROLLED = {"pragma_unroll": 4}  # by nvcc; left alone it takes 16 steps at once, and lists are short
