"""A compiler pass that brings every product with a weight to ``matmul(x, w)`` with ``w`` of shape [K, N]."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.rewriting import Rewriter, is_tensor, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.CanonicalizeLinear")
class CanonicalizeLinear:
    """``matmul(x [..., K], w)`` with ``w`` any form of a [K, N] weight ``-> matmul(x, w [K, N])``.

    ``w`` may be a [1, K, N] weight, or a [K, N] one broadcast over the batch. The ``alpha`` of a Gemm goes into
    the weight: ``matmul(x * c, w) -> matmul(x, w * c)``.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Rewrite every product that has a weight on its right."""
        return rewrite(mod, _canonicalize)


def _canonicalize(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if op_name(value) != "relax.matmul" or not is_tensor(var):
        return None
    data, weight = value.args
    new_data, new_weight = _plain_operand(rw, data, weight), _two_dimensional(rw, weight)
    scaled = _scaled(rw, new_data, new_weight)
    if scaled is not None:
        new_data, new_weight = scaled
    if new_data.same_as(data) and new_weight.same_as(weight):
        return None
    product = relax.BlockBuilder().normalize(relax.op.matmul(new_data, new_weight, value.attrs.out_dtype))
    return product if shape_of(product) == shape_of(var) else None


def _plain_operand(rw: Rewriter, data: relax.Expr, weight: relax.Expr) -> relax.Expr:
    """The activation without a broadcast that only made its batch match a weight's."""
    spread = rw.call(data, "broadcast_to")
    if spread is None or rw.call(weight, "broadcast_to") is None:
        return data
    return spread.args[0]


def _two_dimensional(rw: Rewriter, weight: relax.Expr) -> relax.Expr:
    spread = rw.call(weight, "broadcast_to")
    if spread is not None and is_tensor(spread.args[0]):
        inner = spread.args[0]
        if rw.is_weight(inner) and len(shape_of(inner)) >= 2 and shape_of(inner)[-2:] == shape_of(weight)[-2:]:
            weight = inner
    array = rw.array(weight) if rw.is_weight(weight) else None
    if array is not None and array.ndim > 2 and all(d == 1 for d in array.shape[:-2]):
        return rw.weight(weight.name, array.reshape(array.shape[-2:]))
    return weight


def _scaled(rw: Rewriter, data: relax.Expr, weight: relax.Expr) -> tuple[relax.Expr, relax.Expr] | None:
    product = rw.call(data, "multiply")
    array = rw.array(weight) if rw.is_weight(weight) else None
    if product is None or array is None or not np.issubdtype(array.dtype, np.floating) or rw.uses(data) > 1:
        return None
    for operand, factor in (product.args, product.args[::-1]):
        value = rw.scalar(factor)
        if value is not None and shape_of(operand) == shape_of(data):
            return operand, rw.weight(weight.name, (array.astype(np.float64) * value).astype(array.dtype))
    return None
