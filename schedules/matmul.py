"""The product of two activations, float32: what attention multiplies. Plain row-major tensors, batched."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from pumice.schedules import emit
from pumice.schedules.emit import Expr
from pumice.targets.isa import Isa

_ROWS = 4  # rows of the result in registers at a time


@dataclass(frozen=True)
class Matmul:
    """``c[b, m, n] = sum over k of a[b, m, k] * b[b, k, n]``, all flat float32 arguments: a, b, c.

    ``shared_b`` says that all of the batch multiply one matrix ``b[k, n]``.
    """

    batch: int
    m: int
    n: int
    k: int
    shared_b: bool = False
    threads: int = 1


def matmul(work: Matmul, isa: Isa, name: str = "matmul") -> tirx.PrimFunc:
    """The PrimFunc of ``work``: the lanes run over ``n``, four rows share each load of ``b``."""

    def body() -> None:
        m, n, k = work.m, work.n, work.k
        a, b, c = emit.arguments(
            a=((work.batch * m * k,), "float32"),
            b=(((1 if work.shared_b else work.batch) * k * n,), "float32"),
            c=((work.batch * m * n,), "float32"),
        )

        def tile(batch: Expr, row: Expr, rows: int, column: Expr, vectors: int, lanes: int) -> None:
            acc = emit.registers(rows * vectors, lanes, "float32")
            places = [(r, v, acc[r * vectors + v]) for r in range(rows) for v in range(vectors)]
            for _, _, register in places:
                emit.store(register, 0, emit.splat(0.0, lanes, "float32"), lanes)
            first_b = column if work.shared_b else batch * (k * n) + column
            with T.serial(0, k) as i:
                loaded = [emit.load(b, first_b + i * n + v * lanes, lanes) for v in range(vectors)]
                for r, v, register in places:
                    left = emit.splat(a[(batch * m + row + r) * k + i], lanes)
                    emit.store(register, 0, left * loaded[v] + emit.load(register, 0, lanes), lanes)
            for r, v, register in places:
                to = (batch * m + row + r) * n + column + v * lanes
                emit.store(c, to, emit.load(register, 0, lanes), lanes)

        def rows_of(batch: Expr, row: Expr, rows: int) -> None:
            lanes, widest = isa.lanes, isa.registers // 8
            full, rest = divmod(n, widest * lanes)
            if full:
                with emit.loop(full) as i:
                    tile(batch, row, rows, i * (widest * lanes), widest, lanes)
            column, whole = full * widest * lanes, rest // lanes
            if whole:
                tile(batch, row, rows, tirx.const(column, "int32"), whole, lanes)
            if rest % lanes:
                with emit.loop(rest % lanes) as i:
                    tile(batch, row, rows, i + (column + whole * lanes), 1, 1)

        whole, left_over = divmod(m, _ROWS)
        parts = whole + (left_over > 0)
        parallel = work.threads > 1 and work.batch * m * n * k > _PARALLEL_WORK
        with emit.loop(work.batch * parts, parallel) as unit:
            batch, part = unit // parts, unit % parts

            def rows(full: bool) -> None:
                rows_of(batch, part * _ROWS, _ROWS if full else left_over)

            emit.either(part < whole, whole, left_over, rows)

    return emit.kernel(name, body)


_PARALLEL_WORK = 500_000  # multiply-adds below which waking the other threads costs more than it saves
