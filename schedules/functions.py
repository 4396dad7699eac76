"""Functions of float32 vectors, operator by operator: what elementwise kernels and the layers' epilogues compute.

What a layer's epilogue rounds to bytes must be the same on every target. So a product that is added is an explicit
fused multiply-add, quotients and roots are IEEE's, and the rest are polynomials; ``tests/reference.py`` repeats them
exactly. NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import tirx

from pumice.schedules import emit
from pumice.schedules.emit import Expr
from pumice.targets.intrinsics import llvm


def _number(value: float, lanes: int) -> Expr:
    return emit.splat(value, lanes, "float32")


def _with_nan(value: Expr, other: Expr, lanes: int) -> Expr:
    """``value``, NaN where ``other`` is NaN."""
    return tirx.Select(emit.is_nan(other, lanes), other, value)


def _clip(lanes: int, x: Expr, low: Expr, high: Expr) -> Expr:
    return emit.at_most(emit.at_least(x, low), high)


def _fabs(lanes: int, x: Expr) -> Expr:
    return llvm("llvm.fabs", emit.vector("float32", lanes), x)


def _erf(lanes: int, x: Expr) -> Expr:
    """Within 1.5e-7 of the error function: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26."""
    size = _fabs(lanes, x)
    t = _number(1.0, lanes) / emit.fma(size, _number(0.3275911, lanes), _number(1.0, lanes), lanes)
    series = _number(-1.061405429, lanes)
    for coefficient in (1.453152027, -1.421413741, 0.284496736, -0.254829592):
        series = emit.fma(series, t, _number(coefficient, lanes), lanes)
    bell = emit.exp(_negative(lanes, x * x), lanes)
    value = emit.fma(series * t, bell, _number(1.0, lanes), lanes)
    return llvm("llvm.copysign", emit.vector("float32", lanes), value, x)


def _negative(lanes: int, x: Expr) -> Expr:
    return _number(-0.0, lanes) - x


def _tanh(lanes: int, x: Expr) -> Expr:
    """``1 - 2 / (exp(2x) + 1)``, away from zero; near zero, where that cancels, the series to the fifth power."""
    big = _number(1.0, lanes) - _number(2.0, lanes) / (emit.exp(x + x, lanes) + _number(1.0, lanes))
    square = x * x
    series = emit.fma(square, _number(2 / 15, lanes), _number(-1 / 3, lanes), lanes)
    small = emit.fma(series * square, x, x, lanes)
    return tirx.Select(_fabs(lanes, x) < _number(0.05, lanes), small, big)


def _sigmoid(lanes: int, x: Expr) -> Expr:
    """0 where ``exp`` saturates, lest ``x * sigmoid(x)`` grow again for very negative ``x``."""
    value = _number(1.0, lanes) / (_number(1.0, lanes) + emit.exp(_negative(lanes, x), lanes))
    return tirx.Select(x < _number(-88.0, lanes), _number(0.0, lanes), value)


# Phi(x) = 1/2 + x P(x^2 - 11.25) for |x| <= 4.75, minimax in x Phi(x); the last float32 below makes Phi(4.75) one.
# Beyond, Phi stays: x * Phi(x) is within 5.5e-6 of GELU (Hendrycks, Gimpel, arXiv 1606.08415) everywhere.
_GELU_END, _GELU_MIDDLE = 4.75, 11.25
_GELU = (
    0.148952842, -0.00655647181, 0.000420940894, -2.84650796e-05, 1.89539105e-06, -1.20865437e-07, 6.62506405e-09,
    -2.95750285e-10, 1.83988397e-11, -1.36958977e-12, 4.42617981e-14,
)  # fmt: skip
_GELU_TANH = (
    0.148975983, -0.00656426698, 0.000421922625, -2.85011884e-05, 1.88682566e-06, -1.1793589e-07, 6.2160459e-09,
    -2.83697038e-10, 2.08379321e-11, -1.59259205e-12, 4.9596371e-14,
)  # fmt: skip


def _gelu(lanes: int, x: Expr, coefficients: tuple[float, ...] = _GELU) -> Expr:
    """``x * Phi(x)``: fifteen instructions, none of them a division."""
    end = _number(_GELU_END, lanes)
    above = emit.at_least(x, _number(-_GELU_END, lanes))
    inside = emit.at_most(above, end)
    square = emit.fma(inside, inside, _number(-_GELU_MIDDLE, lanes), lanes)
    series = _number(coefficients[-1], lanes)
    for coefficient in coefficients[-2::-1]:
        series = emit.fma(series, square, _number(coefficient, lanes), lanes)
    return above * emit.fma(inside, series, _number(0.5, lanes), lanes)


def _half(lanes: int, x: Expr, odd: Expr) -> Expr:
    """``x * (1 + odd) / 2``; 0 where x is so low that what is left of the sum is its rounding error."""
    value = x * _number(0.5, lanes) * (_number(1.0, lanes) + odd)
    return tirx.Select(x < _number(-9.0, lanes), _number(0.0, lanes), value)


def _tanh_argument(lanes: int, x: Expr) -> Expr:
    cubic = emit.fma(x * x, _number(0.044715, lanes), _number(1.0, lanes), lanes)
    return x * cubic * _number(math.sqrt(2 / math.pi), lanes)


def _hard_sigmoid(lanes: int, x: Expr) -> Expr:
    line = emit.fma(x, _number(1 / 6, lanes), _number(0.5, lanes), lanes)
    return _clip(lanes, line, _number(0.0, lanes), _number(1.0, lanes))


def _hard_swish(lanes: int, x: Expr) -> Expr:
    gate = _clip(lanes, x + _number(3.0, lanes), _number(0.0, lanes), _number(6.0, lanes))
    return x * (gate * _number(1 / 6, lanes))


def _sqrt(lanes: int, x: Expr) -> Expr:
    return llvm("llvm.sqrt", emit.vector("float32", lanes), x)


def _leaky_relu(lanes: int, x: Expr, slope: Expr | None = None) -> Expr:
    return tirx.Select(x < _number(0.0, lanes), x * (_number(0.01, lanes) if slope is None else slope), x)


# Functions of one tensor that a layer's epilogue takes; after the tensor come the function's numbers, if it has any.
ACTIVATIONS: dict[str, Callable[..., Expr]] = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": _hard_swish,
    "nn.silu": lambda lanes, x: x * _sigmoid(lanes, x),
    "nn.leakyrelu": _leaky_relu,
    "nn.gelu": _gelu,
    "nn.gelu_tanh": lambda lanes, x: _gelu(lanes, x, _GELU_TANH),
}

# Every elementwise operator that has a kernel, by Relax's name.
FUNCTIONS: dict[str, Callable[..., Expr]] = {
    **ACTIVATIONS,
    "add": lambda lanes, a, b: a + b,
    "subtract": lambda lanes, a, b: a - b,
    "multiply": lambda lanes, a, b: a * b,
    "divide": lambda lanes, a, b: a / b,
    "maximum": lambda lanes, a, b: _with_nan(emit.at_least(a, b), b, lanes),
    "minimum": lambda lanes, a, b: _with_nan(emit.at_most(a, b), b, lanes),
    "clip": _clip,
    "sqrt": _sqrt,
    "negative": _negative,
    "abs": _fabs,
    "nn.relu": lambda lanes, x: emit.at_least(x, _number(0.0, lanes)),
    "erf": _erf,
    # Alone they may take their time, and are as exact as the rest.
    "nn.gelu": lambda lanes, x: _half(lanes, x, _erf(lanes, x * _number(math.sqrt(0.5), lanes))),
    "nn.gelu_tanh": lambda lanes, x: _half(lanes, x, _tanh(lanes, _tanh_argument(lanes, x))),
}
