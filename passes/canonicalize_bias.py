"""A compiler pass that gives every bias its one form: the second operand, [N] or [1, N, 1, 1]."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.layer_outputs import bias_shape, layer_output, per_channel
from pumice.passes.rewriting import Rewriter, dtype_of, is_tensor, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.CanonicalizeBias")
class CanonicalizeBias:
    """``add(b, matmul(x, w)) -> add(matmul(x, w), b [N])``; for conv2d ``b [1, N, 1, 1]``.

    A bias of any shape that adds one number to each channel is a bias, a single number included; ``subtract(y, b)
    -> add(y, -b)``. A constant becomes a parameter called ``<layer>.bias``.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Rewrite every bias."""
        return rewrite(mod, _canonicalize)


def _canonicalize(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if op_name(value) not in ("relax.add", "relax.subtract") or not is_tensor(var):
        return None
    negated = op_name(value) == "relax.subtract"
    for data, operand in (value.args,) if negated else (value.args, value.args[::-1]):
        output = layer_output(rw, data)
        if output is None or output.bias is not None or shape_of(var) != output.shape:
            continue
        number = per_channel(rw, operand, output.shape, output.channel_axis)
        if number is None:
            continue
        bias = (-number if negated else number).astype(dtype_of(data)).reshape(bias_shape(output.layer))
        if rw.is_weight(operand) and shape_of(operand) == bias.shape and not negated:
            return None if data.same_as(value.args[0]) else relax.op.add(data, operand)
        name = operand.name if rw.is_weight(operand) else output.bias_name
        return relax.op.add(data, rw.weight(name, np.ascontiguousarray(bias)))
    return None
