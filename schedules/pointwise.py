"""Elementwise operators on plain or packed float32: rows of a tensor, with operands that broadcast along them."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.schedules.functions import FUNCTIONS
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Pointwise:
    """``y = operator(operands)`` over ``rows`` x ``length`` float32.

    Each entry of ``operands`` says how that operand runs along: ``full`` (like y), ``row`` (``[length]``, the same
    for all rows), or a number. Arguments: the tensors among the operands, flat, then y.
    """

    operator: str
    rows: int
    length: int
    operands: tuple[str | float, ...]
    threads: int = 1


def pointwise(work: Pointwise, isa: Isa, name: str = "pointwise") -> tirx.PrimFunc:
    """The PrimFunc of ``work``."""

    def body() -> None:
        size = work.rows * work.length
        sizes = {"full": size, "row": work.length}
        tensors = {f"x{i}": ((sizes[o],), "float32") for i, o in enumerate(work.operands) if isinstance(o, str)}
        buffers = emit.arguments(**tensors, y=((size,), "float32"))
        y = buffers[-1]

        def strip(row: Expr, column: Expr, lanes: int) -> None:
            given = iter(buffers)
            values = [_operand(o, given, row * work.length, column, lanes) for o in work.operands]
            emit.store(y, row * work.length + column, FUNCTIONS[work.operator](lanes, *values), lanes)

        with emit.loop(work.rows, work.threads > 1 and size > _PARALLEL_SIZE) as row:
            emit.for_strips(work.length, isa.lanes, lambda column, lanes: strip(row, column, lanes))

    return emit.kernel(name, body)


def _operand(kind: str | float, given: object, start: Expr, column: Expr, lanes: int) -> Expr:
    if not isinstance(kind, str):
        return emit.splat(float(kind), lanes, "float32")
    buffer: Buffer = next(given)  # type: ignore[call-overload]
    return emit.load(buffer, start + column if kind == "full" else column, lanes)


_PARALLEL_SIZE = 100_000  # elements below which waking the other threads costs more than it saves
