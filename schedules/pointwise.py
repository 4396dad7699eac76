"""Elementwise operators on plain or packed float32: rows of a tensor, with operands that broadcast along them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from pumice.schedules import emit
from pumice.schedules.emit import Buffer, Expr
from pumice.targets.isa import Isa, llvm


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


def _number(value: float, lanes: int) -> Expr:
    return emit.splat(value, lanes, "float32")


def _with_nan(value: Expr, other: Expr, lanes: int) -> Expr:
    """``value``, NaN where ``other`` is NaN."""
    return tirx.Select(emit.is_nan(other, lanes), other, value)


def _erf(lanes: int, x: Expr) -> Expr:
    """Within 1.5e-7 of the error function: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    size = llvm("llvm.fabs", emit.vector("float32", lanes), x)
    t = _number(1.0, lanes) / emit.fma(size, _number(0.3275911, lanes), _number(1.0, lanes), lanes)
    series = _number(1.061405429, lanes)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = emit.fma(series, t, _number(coefficient, lanes), lanes)
    value = _number(1.0, lanes) - series * t * emit.exp(_number(0.0, lanes) - size * size, lanes)
    return llvm("llvm.copysign", emit.vector("float32", lanes), value, x)


def _tanh(lanes: int, x: Expr) -> Expr:
    """``1 - 2 / (exp(2x) + 1)``, away from zero; near zero, where that cancels, the series to the fifth power."""
    big = _number(1.0, lanes) - _number(2.0, lanes) / (emit.exp(x + x, lanes) + _number(1.0, lanes))
    square = x * x
    series = emit.fma(square, _number(2 / 15, lanes), _number(-1 / 3, lanes), lanes)
    small = emit.fma(series * square, x, x, lanes)
    return tirx.Select(llvm("llvm.fabs", emit.vector("float32", lanes), x) < _number(0.05, lanes), small, big)


def _sigmoid(lanes: int, x: Expr) -> Expr:
    """0 where ``exp`` saturates, lest ``x * sigmoid(x)`` grow again for very negative ``x``."""
    value = _number(1.0, lanes) / (_number(1.0, lanes) + emit.exp(_number(0.0, lanes) - x, lanes))
    return tirx.Select(x < _number(-88.0, lanes), _number(0.0, lanes), value)


def _gelu(lanes: int, x: Expr) -> Expr:
    return x * _number(0.5, lanes) * (_number(1.0, lanes) + _erf(lanes, x * _number(math.sqrt(0.5), lanes)))


def _gelu_tanh(lanes: int, x: Expr) -> Expr:
    inner = x * emit.fma(x * x, _number(0.044715, lanes), _number(1.0, lanes), lanes)
    tanh = _tanh(lanes, inner * _number(math.sqrt(2 / math.pi), lanes))
    return x * _number(0.5, lanes) * (_number(1.0, lanes) + tanh)


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "add": lambda lanes, a, b: a + b,
    "subtract": lambda lanes, a, b: a - b,
    "multiply": lambda lanes, a, b: a * b,
    "divide": lambda lanes, a, b: a / b,
    "maximum": lambda lanes, a, b: _with_nan(emit.at_least(a, b), b, lanes),
    "minimum": lambda lanes, a, b: _with_nan(emit.at_most(a, b), b, lanes),
    "clip": lambda lanes, x, low, high: emit.at_most(emit.at_least(x, low), high),
    "sqrt": lambda lanes, x: llvm("llvm.sqrt", emit.vector("float32", lanes), x),
    "negative": lambda lanes, x: _number(-0.0, lanes) - x,
    "abs": lambda lanes, x: llvm("llvm.fabs", emit.vector("float32", lanes), x),
    "nn.relu": lambda lanes, x: emit.at_least(x, _number(0.0, lanes)),
    "erf": _erf,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "nn.silu": lambda lanes, x: x * _sigmoid(lanes, x),
    "nn.gelu": _gelu,
    "nn.gelu_tanh": _gelu_tanh,
}

_PARALLEL_SIZE = 100_000  # elements below which waking the other threads costs more than it saves
