"""A compiler pass that moves an int8 weight's data before it is dequantized, so that layers read it directly."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.rewriting import Rewriter, dtype_of, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.SinkBelowDequantize")
class SinkBelowDequantize:
    """``permute_dims(dequantize(w, axis=a)) -> dequantize(permute_dims(w), axis=b)``; likewise the reshapes.

    For int8 and uint8 weights. The move is then done at compile time, and what feeds the layer is the quantized
    form. A reshape that splits or merges the axis of the scales stays where it is.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Sink every move."""
        return rewrite(mod, _sink)


_MOVES = ("relax.permute_dims", "relax.reshape", "relax.expand_dims", "relax.squeeze")


def _sink(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if op_name(value) not in _MOVES:
        return None
    dequantized = rw.call(value.args[0], "dequantize")
    if dequantized is None:
        return None
    data, scale, zero_point = dequantized.args
    array, scales, zero = rw.array(data), rw.array(scale), rw.array(zero_point)
    if array is None or scales is None or zero is None or dtype_of(data) not in ("int8", "uint8"):
        return None
    axis = int(dequantized.attrs.axis) % max(1, array.ndim)
    if op_name(value) == "relax.permute_dims":
        axes = value.attrs.axes
        order = list(reversed(range(array.ndim))) if axes is None else [int(a) % array.ndim for a in axes]
        moved, new_axis = array.transpose(order), order.index(axis)
    else:
        moved = array.reshape(shape_of(var))
        if scales.size == 1 and zero.size == 1:
            new_axis = 0
        elif list(moved.shape).count(array.shape[axis]) == 1 and array.shape[axis] > 1:
            new_axis = moved.shape.index(array.shape[axis])
            before, after = int(np.prod(array.shape[:axis])), int(np.prod(moved.shape[:new_axis]))
            if before != after:
                return None
        else:
            return None
    source = rw.derived([data], np.ascontiguousarray(moved))
    return relax.op.dequantize(source, scale, zero_point, axis=new_axis, out_dtype=dequantized.attrs.out_dtype)
