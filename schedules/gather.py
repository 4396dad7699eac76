"""Rows of a float32 table by number: embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from pumice.schedules import emit
from pumice.schedules.emit import Expr
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Gather:
    """``y[i] = table[min(max(index[i], 0), entries - 1)]``: a number that is none of the table's reads its end.

    Arguments: table float32 ``[entries * length]``; index ``[rows]`` of ``index_dtype``; y float32
    ``[rows * length]``.
    """

    entries: int
    length: int
    rows: int
    index_dtype: str  # int32 or int64
    threads: int = 1


def gather(work: Gather, isa: Isa, name: str = "gather") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""

    def body() -> None:
        table = emit.argument("table", (work.entries * work.length,), "float32")
        index = emit.argument("index", (work.rows,), work.index_dtype)
        y = emit.argument("y", (work.rows * work.length,), "float32")

        def number(value: int) -> Expr:
            return tirx.const(value, work.index_dtype)

        with emit.loop(work.rows, work.threads > 1 and work.rows * work.length > _PARALLEL_SIZE) as row:
            inside = tirx.min(tirx.max(index[row], number(0)), number(work.entries - 1))
            start = tirx.Cast("int32", inside) * work.length
            emit.for_strips(
                work.length,
                isa.lanes,
                lambda i, n: emit.store(y, row * work.length + i, emit.load(table, start + i, n), n),
            )

    return emit.kernel(name, body)


_PARALLEL_SIZE = 100_000  # elements below which waking the other threads costs more than it saves
