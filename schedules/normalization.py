"""Softmax and layer normalization over the last axis, float32, on plain tensors: rows one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.targets.intrinsics import llvm
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Softmax:
    """``y = exp(x - max(x)) / sum(exp(x - max(x)))``. Arguments: x, y float32 ``[rows * length]``.

    A row with a NaN or +inf, and one of -inf alone, is NaN throughout, as the formula says.
    """

    rows: int
    length: int
    threads: int = 1


def softmax(work: Softmax, isa: Isa, name: str = "softmax") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""

    def body() -> None:
        size = work.rows * work.length
        x, y = emit.arguments(x=((size,), "float32"), y=((size,), "float32"))
        with emit.loop(work.rows, work.threads > 1 and size > _PARALLEL_SIZE) as row:
            rows = _Row(isa, row * work.length, work.length)
            largest = rows.reduce("fmax", float("-inf"), lambda at, n: emit.load(x, at, n))

            def exponent(at: Expr, n: int) -> Expr:
                value = emit.exp(emit.load(x, at, n) - emit.splat(largest, n, "float32"), n)
                emit.store(y, at, value, n)
                return value

            total = rows.reduce("fadd", 0.0, exponent)
            inverse = rows.scalar(tirx.const(1.0, "float32") / total)
            rows.each(lambda at, n: emit.store(y, at, emit.load(y, at, n) * emit.splat(inverse, n), n))

    return emit.kernel(name, body)


@dataclass(frozen=True)
class LayerNorm:
    """``y = (x - mean) / sqrt(var + epsilon) * gamma + beta`` (Ba et al., arXiv 1607.06450), two passes.

    Arguments: x float32 ``[rows * length]``; gamma, beta float32 ``[length]``; y like x.
    """

    rows: int
    length: int
    epsilon: float
    threads: int = 1


def layer_norm(work: LayerNorm, isa: Isa, name: str = "layer_norm") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""

    def body() -> None:
        size, length = work.rows * work.length, work.length
        x, gamma, beta, y = emit.arguments(
            x=((size,), "float32"), gamma=((length,), "float32"), beta=((length,), "float32"), y=((size,), "float32")
        )
        with emit.loop(work.rows, work.threads > 1 and size > _PARALLEL_SIZE) as row:
            rows = _Row(isa, row * length, length)
            count = tirx.const(1.0 / length, "float32")
            mean = rows.scalar(rows.reduce("fadd", 0.0, lambda at, n: emit.load(x, at, n)) * count)

            def centred(at: Expr, n: int) -> Expr:
                return emit.load(x, at, n) - emit.splat(mean, n)

            def squared(at: Expr, n: int) -> Expr:
                return centred(at, n) * centred(at, n)

            variance = rows.reduce("fadd", 0.0, squared) * count
            root = llvm("llvm.sqrt", "float32", variance + tirx.const(work.epsilon, "float32"))
            inverse = rows.scalar(tirx.const(1.0, "float32") / root)

            def write(at: Expr, n: int) -> None:
                column = at - row * length
                scaled = centred(at, n) * emit.splat(inverse, n)
                value = emit.fma(scaled, emit.load(gamma, column, n), emit.load(beta, column, n), n)
                emit.store(y, at, value, n)

            rows.each(write)

    return emit.kernel(name, body)


class _Row:
    """One row: loops and reductions over its elements."""

    def __init__(self, isa: Isa, start: Expr, length: int) -> None:
        self.lanes, self.start, self.length = isa.lanes, start, length

    def each(self, body: Callable[[Expr, int], None]) -> None:
        """``body(index, lanes)`` over the row."""
        emit.for_strips(self.length, self.lanes, lambda i, n: body(self.start + i, n))

    def reduce(self, operation: str, neutral: float, value: Callable[[Expr, int], Expr]) -> Expr:
        """The sum (fadd) or maximum (fmax) of ``value``, kept in a vector until the end."""
        wide: Buffer = T.alloc_buffer((self.lanes,), "float32", scope="global")
        emit.store(wide, 0, emit.splat(neutral, self.lanes, "float32"), self.lanes)

        def step(at: Expr, n: int) -> None:
            old, new = emit.load(wide, 0, n), value(at, n)
            emit.store(wide, 0, old + new if operation == "fadd" else tirx.max(old, new), n)

        self.each(step)
        vector = emit.load(wide, 0, self.lanes)
        return self.scalar(emit.across(operation, vector, self.lanes))

    def scalar(self, value: Expr) -> Expr:
        """``value``, computed once."""
        cell = T.alloc_buffer((1,), "float32", scope="global")
        T.buffer_store(cell, value, [0])
        return cell[0]


_PARALLEL_SIZE = 100_000  # elements below which waking the other threads costs more than it saves
