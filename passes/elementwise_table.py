"""Any function of one uint8 tensor is a table of 256 bytes: found by walking back from a quantize.

quantize(f(g(dequantize(x)), constants))   ==>   table[x]
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from tvm import relax

from pumice.passes.elementwise_numpy import ELEMENTWISE, apply
from pumice.passes.fusion import Quant
from pumice.passes.rewriting import shape_of

if TYPE_CHECKING:
    from pumice.passes.packed import Builder, Packed


def table_of(builder: Builder, var: relax.Var, quant: Quant) -> tuple[Packed, np.ndarray] | None:
    """The packed uint8 tensor that ``var`` is a function of, and ``quantize(var)`` for each of its 256 values."""
    leaves: dict[relax.Expr, Packed] = {}
    values = _values(builder, var, leaves)
    if values is None or len(leaves) != 1:
        return None
    stored = np.rint(values.astype(np.float32) / np.float32(quant.scale)) + quant.zero_point
    table = np.clip(np.nan_to_num(stored, nan=quant.zero_point), 0, 255).astype(np.uint8)
    return next(iter(leaves.values())), table


def _values(builder: Builder, expr: relax.Expr, leaves: dict[relax.Expr, Packed]) -> np.ndarray | None:
    """The values of ``expr`` for each stored byte 0..255, float64 ``[256]``."""
    packed = builder.packed(expr) if isinstance(expr, relax.Var) else None
    if packed is not None and packed.quant is not None:
        if leaves and packed.expr not in [leaf.expr for leaf in leaves.values()]:
            return None
        leaves.setdefault(packed.expr, packed)
        return (np.arange(256) - packed.quant.zero_point) * np.float64(packed.quant.scale)
    call = builder.graph.flow.value.get(expr) if isinstance(expr, relax.Var) else None
    operator = builder.graph.flow.op(expr) if call is not None else ""
    if call is None or operator not in ELEMENTWISE or shape_of(expr) != _largest_shape(call):
        return None
    operands = []
    for argument in call.args:
        number = builder.graph.number(argument)
        if number is not None:
            operands.append(np.asarray(number))
            continue
        values = _values(builder, argument, leaves)
        if values is None:
            return None
        operands.append(values)
    return apply(call, expr, operands)


def _largest_shape(call: relax.Call) -> tuple[int, ...]:
    shapes = [shape_of(arg) for arg in call.args if isinstance(arg, relax.Var)]
    return max(shapes, key=lambda shape: math.prod(shape), default=())
