"""What happens to an accumulator before it is stored: scale, residual, activation, requantize.

int8 to uint8: ``clamp(round_half_even(fma(float(acc), multiplier[n], residual)) + zero_point, low, high)`` where
``residual = float(r - residual.zero_point) * residual.multiplier``; int8 to float32:
``clamp(fma(float(acc), multiplier[n], residual), low, high)``; float32: ``clamp(acc + residual, low, high)``.
All in float32, each operation rounded once, the fused multiply-add explicit: every target gives the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pumice.schedules import emit
from pumice.schedules.emit import Expr


@dataclass(frozen=True)
class Residual:
    """A second operand that is added before the activation; for int8 ``(r - zero_point) * multiplier``."""

    multiplier: float = 1.0
    zero_point: int = 0


@dataclass(frozen=True)
class Epilogue:
    """From accumulator to output; ``low`` and ``high`` (quantized units for uint8) are the activation's clamp."""

    output: str = "uint8"  # or float32
    residual: Residual | None = None
    zero_point: int = 0
    low: float = 0
    high: float = 255


def finish(acc: Expr, scale: Expr | None, residual: Expr | None, epilogue: Epilogue, lanes: int) -> Expr:
    """The stored value of one vector: int32 in 0..255, or float32. ``scale`` is None for float32 accumulators."""
    if scale is not None:
        value = emit.to_float(acc, lanes)
        value = value * scale if residual is None else emit.fma(value, scale, residual, lanes)
    else:
        value = acc if residual is None else acc + residual
    if epilogue.output == "uint8":
        return emit.round_to_int(value, int(epilogue.low), int(epilogue.high), epilogue.zero_point, lanes)
    if np.isfinite(epilogue.low):
        value = emit.at_least(value, emit.splat(float(epilogue.low), lanes, "float32"))
    if np.isfinite(epilogue.high):
        value = emit.at_most(value, emit.splat(float(epilogue.high), lanes, "float32"))
    return value


def centred_residual(value: Expr, epilogue: Epilogue, lanes: int) -> Expr:
    """The float32 residual of int32 values in 0..255."""
    spec = epilogue.residual or Residual()
    centred = value - emit.splat(spec.zero_point, lanes)
    return emit.to_float(centred, lanes) * emit.splat(spec.multiplier, lanes, "float32")
