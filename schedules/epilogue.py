"""What happens to an accumulator before it is stored: scale, residual, activation, requantize.

    float32:         clamp(activation(acc + residual), low, high)
    int8 to float32: clamp(activation(fma(float(acc), multiplier[n], residual)), low, high)
    int8 to uint8:   clamp(round_half_even(value) + zero_point, low, high) where value is
                     fma(float(acc), multiplier[n], residual)  in units of the output, or with an activation
                     activation(fma(float(acc), multiplier[n], residual)) * scale

with ``residual = float(r - residual.zero_point) * residual.multiplier`` where that is uint8. All in float32, each
operation rounded once, the fused multiply-add explicit: every target gives the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from pumice.schedules import emit
from pumice.schedules.emit import Expr
from pumice.schedules.functions import ACTIVATIONS
from pumice.targets.intrinsics import llvm
from pumice.targets.isa import Isa


@dataclass(frozen=True)
class Residual:
    """A second operand that is added before the activation; for int8 ``(r - zero_point) * multiplier``."""

    multiplier: float = 1.0
    zero_point: int = 0


@dataclass(frozen=True)
class Epilogue:
    """From accumulator to output; ``low`` and ``high`` (quantized units for uint8) are the last clamp."""

    output: str = "uint8"  # or float32
    residual: Residual | None = None
    zero_point: int = 0
    low: float = 0
    high: float = 255
    activation: str | None = None  # a name of ACTIVATIONS, computed before the clamp
    scale: float = 1.0  # of the activation's result, for uint8: 1 / the output's scale
    fits: bool = False  # whether what is rounded to uint8 fits int32 for every accumulator
    parameters: tuple[float, ...] = ()  # of the activation


def finish(acc: Expr, scale: Expr | None, residual: Expr | None, epilogue: Epilogue, lanes: int) -> Expr:
    """The stored value of one vector: int32 in 0..255, or float32. ``scale`` is None for float32 accumulators."""
    value = _value(acc, scale, residual, epilogue, lanes)
    if epilogue.output == "uint8":
        return emit.round_to_int(value, int(epilogue.low), int(epilogue.high), epilogue.zero_point, lanes)
    if np.isfinite(epilogue.low):
        value = emit.at_least(value, emit.splat(float(epilogue.low), lanes, "float32"))
    if np.isfinite(epilogue.high):
        value = emit.at_most(value, emit.splat(float(epilogue.high), lanes, "float32"))
    return value


def round_unsaturated(acc: Expr, scale: Expr | None, residual: Expr | None, epilogue: Epilogue, isa: Isa) -> Expr:
    """As ``finish`` to uint8, without zero point and clamp: ``pack_pair`` and ``pack_words`` do these on the way."""
    lanes = isa.lanes
    value = _value(acc, scale, residual, epilogue, lanes)
    if not epilogue.fits:
        value = emit.fitting(value, epilogue.low, epilogue.high, epilogue.zero_point, lanes)
    return isa.round(value)


def _value(acc: Expr, scale: Expr | None, residual: Expr | None, epilogue: Epilogue, lanes: int) -> Expr:
    """What is clamped, or rounded."""
    value = acc if scale is None else emit.to_float(acc, lanes)
    if residual is not None:
        value = value + residual if scale is None else emit.fma(value, scale, residual, lanes)
    elif scale is not None and epilogue.activation is None:
        value = value * scale
    elif scale is not None:  # a plain product might be fused with the activation's first sum, or not
        value = emit.fma(value, scale, emit.splat(0.0, lanes, "float32"), lanes)
    if epilogue.activation is None:
        return value
    parameters = [emit.splat(parameter, lanes, "float32") for parameter in epilogue.parameters]
    value = ACTIVATIONS[epilogue.activation](lanes, value, *parameters)
    return value * emit.splat(epilogue.scale, lanes, "float32") if epilogue.output == "uint8" else value


def centred_residual(value: Expr, epilogue: Epilogue, lanes: int) -> Expr:
    """The float32 residual of int32 values in 0..255."""
    spec = epilogue.residual or Residual()
    return _scaled_residual(value - emit.splat(spec.zero_point, lanes), spec, lanes)


def residual_of_word(word: Expr, byte: Expr | int, epilogue: Epilogue, isa: Isa) -> Expr:
    """The float32 residual of one byte of each word; where int8 products are one instruction, that takes it out."""
    spec = epilogue.residual or Residual()
    if not isa.has_dot:
        return centred_residual(emit.byte_of(emit.turn(word, isa, isa.lanes), byte, isa.lanes), epilogue, isa.lanes)
    chosen = emit.splat(tirx.shift_left(tirx.const(1, "int32"), byte * 8), isa.lanes)
    return _scaled_residual(isa.dot4(emit.splat(isa.sign - spec.zero_point, isa.lanes), word, chosen), spec, isa.lanes)


def _scaled_residual(centred: Expr, spec: Residual, lanes: int) -> Expr:
    return emit.to_float(centred, lanes) * emit.splat(spec.multiplier, lanes, "float32")


def pack_pair(first: Expr, second: Expr, epilogue: Epilogue, isa: Isa) -> Expr:
    """Two vectors of ``round_unsaturated`` -> one int32 vector that holds both, for ``pack_words``.

    Where the instructions that narrow also saturate, zero point and clamp cost little: int16 is wide enough for what
    a zero point moves into 0..255, and a byte is clamped as a byte.
    """
    lanes = isa.lanes
    if isa.narrow is not None:
        pair = isa.narrow[0](lanes, first, second)
        if epilogue.zero_point != isa.sign:
            shift = emit.splat(tirx.const(epilogue.zero_point - isa.sign, "int16"), 2 * lanes)
            pair = llvm("llvm.sadd.sat", f"int16x{2 * lanes}", pair, shift)
        return tirx.reinterpret(emit.vector("int32", lanes), pair)
    low, high = emit.splat(int(epilogue.low), lanes), emit.splat(int(epilogue.high), lanes)
    shifted = [value + emit.splat(epilogue.zero_point, lanes) for value in (first, second)]
    return emit.pack_bytes([tirx.min(tirx.max(value, low), high) for value in shifted], lanes)


def pack_words(first: Expr, second: Expr, epilogue: Epilogue, isa: Isa) -> Expr:
    """Two of ``pack_pair`` -> one vector of packed words, the first value lowest."""
    lanes = isa.lanes
    if isa.narrow is None:
        return emit.turn(tirx.bitwise_or(first, tirx.shift_left(second, emit.splat(16, lanes))), isa, lanes)
    halves = [tirx.reinterpret(f"int16x{2 * lanes}", half) for half in (first, second)]
    dtype = "int8" if isa.sign else "uint8"
    packed = tirx.reinterpret(f"{dtype}x{4 * lanes}", isa.narrow[1](lanes, *halves))
    if epilogue.low > 0:
        packed = tirx.max(packed, emit.splat(tirx.const(int(epilogue.low) - isa.sign, dtype), 4 * lanes))
    if epilogue.high < 255:
        packed = tirx.min(packed, emit.splat(tirx.const(int(epilogue.high) - isa.sign, dtype), 4 * lanes))
    # In each 128 bits: four bytes of the first value, four of the second, third, fourth; wanted is a byte of each.
    order = [16 * (i // 16) + 4 * (i % 4) + i % 16 // 4 for i in range(4 * lanes)]
    shuffled = tirx.Shuffle([packed], [tirx.const(i, "int32") for i in order])
    return tirx.reinterpret(emit.vector("int32", lanes), shuffled)


def place_bytes(word: Expr, places: list[Expr], isa: Isa) -> Expr:
    """Words with byte ``k`` moved to the byte ``places[k]`` (int32 0..3, a permutation)."""
    lanes = isa.lanes
    if isa.shuffle is None:
        moved = [
            tirx.shift_left(emit.byte_of(word, k, lanes), emit.splat(place * 8, lanes))
            for k, place in enumerate(places)
        ]
        return moved[0] | moved[1] | moved[2] | moved[3]
    # The control says for each byte which one of its 16 comes there: that of its own word, so 4 * (lane % 4) more.
    control = tirx.const(0, "int32")
    for k, place in enumerate(places):
        control = control + tirx.shift_left(tirx.const(k, "int32"), place * 8)
    lowest = tirx.Shuffle(
        [tirx.const(emit.splat_word(4 * (lane % 4)), "int32") for lane in range(lanes)], [*range(lanes)]
    )
    return isa.shuffle(lanes, word, emit.splat(control, lanes) + lowest)
