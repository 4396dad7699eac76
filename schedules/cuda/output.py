"""What a thread does with finished accumulators: the epilogue of the CPU's kernels, in one lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.blocks import QUAD
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.epilogue import Epilogue, centred_residual, finish
from pumice.schedules.places import Places


class Layer(Protocol):
    """What a kernel's output depends on."""

    @property
    def dtype(self) -> str:
        """The data type of the multiplication."""

    @property
    def rows(self) -> int:
        """Output rows, a multiple of 4."""

    @property
    def quads(self) -> int:
        """Quads of output rows."""

    @property
    def places(self) -> Places:
        """Where it is read and written."""

    @property
    def epilogue(self) -> Epilogue:
        """From accumulator to output."""


class Output:
    """The arguments of a kernel from its bias on, declared when this is made; they come last."""

    def __init__(self, work: Layer) -> None:
        self.work, self.packed = work, work.epilogue.output == "uint8"
        self.positions = work.places.target.positions
        is_int8, target = work.dtype == "int8", work.places.target
        self.bias = emit.argument("bias", (work.rows,), "int32" if is_int8 else "float32")
        self.multiplier = emit.argument("multiplier", (work.rows,), "float32") if is_int8 else None
        shape = (work.quads, self.positions, 4) if self.packed else (work.rows, self.positions, 1)
        residual = emit.argument("residual", shape, work.epilogue.output) if work.epilogue.residual else None
        self.mask = emit.argument("mask", (self.positions,), "int32") if target.is_padded else None
        y = emit.argument("y", shape, work.epilogue.output)
        word = "int32" if self.packed else "float32"
        self.residual = emit.words_of(residual, word) if residual is not None else None
        self.y = emit.words_of(y, word)

    def store(self, quad: Expr, position: Expr, acc: Callable[[int], Expr]) -> None:
        """Four rows at one position; ``acc(row)`` is an accumulator."""
        epilogue = self.work.epilogue
        if not self.packed:
            done = local("float32")
            for row in range(QUAD):
                place = (quad * QUAD + row) * self.positions + position
                other = None if self.residual is None else self.residual[place]
                T.buffer_store(done, finish(acc(row), self._scale(quad, row), other, epilogue, 1), [0])
                T.buffer_store(self.y, self._masked(done[0], position), [place])
            return
        place = quad * self.positions + position
        word = None
        if self.residual is not None:
            word = local("int32")
            T.buffer_store(word, self.residual[place], [0])
        rounded = local("int32", QUAD)
        for row in range(QUAD):
            other = None if word is None else centred_residual(emit.byte_of(word[0], row, 1), epilogue, 1)
            value = finish(acc(row), self._scale(quad, row), other, epilogue, 1)
            T.buffer_store(rounded, value, [row])
        packed = emit.pack_bytes([rounded[row] for row in range(QUAD)], 1)
        T.buffer_store(self.y, self._masked(packed, position), [place])

    def fill(self, quad: Expr, first: int, end: int, lane: Expr, step: int) -> None:
        """Padding of four rows at the positions from ``first`` to ``end``, every ``step``-th from ``lane`` on."""
        if end <= first:
            return
        with T.serial(0, -(-(end - first) // step)) as i:
            position = first + i * step + lane
            with T.If(position < end), T.Then():
                if self.packed:
                    T.buffer_store(self.y, self._padding(), [quad * self.positions + position])
                    return
                for row in range(QUAD):
                    T.buffer_store(self.y, self._padding(), [(quad * QUAD + row) * self.positions + position])

    def _padding(self) -> Expr:
        if not self.packed:
            return tirx.const(0.0, "float32")
        return tirx.const(emit.splat_word(self.work.epilogue.zero_point), "int32")

    def _masked(self, value: Expr, position: Expr) -> Expr:
        return value if self.mask is None else tirx.Select(self.mask[position] != 0, value, self._padding())

    def _scale(self, quad: Expr, row: int) -> Expr | None:
        return None if self.multiplier is None else self.multiplier[quad * QUAD + row]


def local(dtype: str, count: int = 1) -> Buffer:
    """``count`` registers of a thread."""
    return T.alloc_buffer((count,), dtype, scope="local")


def barrier() -> None:
    """All threads of the block wait for each other."""
    T.evaluate(T.tvm_storage_sync("shared"))


def product(work: Layer, x: Expr, w: Expr, acc: Expr) -> Expr:
    """``acc + x . w``: four bytes by four, or float32."""
    if work.dtype == "int8":
        return tirx.call_pure_extern("int32", "pumice_dp4a_us", x, w, acc)
    return emit.fma(x, w, acc, 1)
