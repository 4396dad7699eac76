"""A compiler pass that gives each activation function its one form: relu, leaky relu, or clip with two bounds."""

from __future__ import annotations

import math

import tvm
from tvm import relax, tirx, topi
from tvm.ir import IRModule
from tvm_ffi import structural_equal

from pumice.passes.numpy_operators import plain
from pumice.passes.rewriting import Rewriter, dtype_of, is_tensor, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.CanonicalizeActivations")
class CanonicalizeActivations:
    """Every clamp of floats ``-> nn.relu(x)`` or ``clip(x, low, high)``.

    ``maximum(x, 0) -> nn.relu(x)``; ``minimum(maximum(x, a), b) -> clip(x, a, b)``, in either order, as operators
    or as the PrimFuncs that the ONNX importer calls for them; ``nn.relu6(x) -> clip(x, 0, 6)``;
    ``clip(clip(x, a, inf), -inf, b) -> clip(x, a, b)``; ``clip(x, 0, inf) -> nn.relu(x)``.

    ``nn.prelu(x, [a, a, ...])`` and, for ``0 < a < 1``, ``maximum(x, a * x) -> nn.leakyrelu(x, a)``.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Rewrite every clamp."""
        return rewrite(mod, _canonicalize)


Bounds = tuple[relax.Expr, float, float]


def _canonicalize(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if not op_name(value) or not is_tensor(var) or not dtype_of(var).startswith("float"):
        return None
    clamp = _clamp(rw, value)
    if clamp is None:
        return _leaky(rw, value)
    data, low, high = clamp
    if shape_of(data) != shape_of(var):
        return None
    inner = rw.call(data)
    inner_clamp = None if inner is None else _clamp(rw, inner)
    if inner_clamp is not None:
        # min(max(min(max(x, a), b), c), d): the outer bounds win where the ranges do not meet.
        data, inner_low, inner_high = inner_clamp
        low, high = min(max(inner_low, low), high), max(min(inner_high, high), low)
    if (low, high) == (-math.inf, math.inf):
        return data
    if (low, high) == (0, math.inf):
        return None if op_name(value) == "relax.nn.relu" and inner_clamp is None else relax.op.nn.relu(data)
    if math.inf in (-low, high):
        return None if op_name(value) != "relax.call_tir" else _one_sided(data, low, high, dtype_of(var))
    if op_name(value) == "relax.clip" and inner_clamp is None and _has_float_bounds(value, dtype_of(var)):
        return None
    return relax.op.clip(data, tirx.FloatImm(dtype_of(var), low), tirx.FloatImm(dtype_of(var), high))


def _leaky(rw: Rewriter, value: relax.Call) -> relax.Expr | None:
    """A line with another slope below zero."""
    operator = op_name(value).removeprefix("relax.")
    if operator == "nn.prelu":
        slopes = rw.array(value.args[1])
        if slopes is None or slopes.size == 0 or slopes.min() != slopes.max():
            return None
        return relax.op.nn.leakyrelu(value.args[0], float(slopes.flat[0]))
    if operator == "maximum":
        for data, scaled in (value.args, value.args[::-1]):
            product = rw.call(scaled, "multiply")
            for factor, other in (product.args, product.args[::-1]) if product is not None else ():
                slope = rw.scalar(factor)
                if slope is not None and 0 < slope < 1 and other.same_as(data):
                    return relax.op.nn.leakyrelu(data, slope)
    return None


def _has_float_bounds(clip: relax.Call, dtype: str) -> bool:
    return all(isinstance(bound, tirx.FloatImm) and bound.ty.dtype == dtype for bound in clip.args[1:])


def _one_sided(data: relax.Expr, low: float, high: float, dtype: str) -> relax.Expr:
    if high == math.inf:
        return relax.op.maximum(data, relax.const(low, dtype))
    return relax.op.minimum(data, relax.const(high, dtype))


def _clamp(rw: Rewriter, value: relax.Call) -> Bounds | None:
    """The operand and the bounds, of a call that clamps."""
    operator = op_name(value).removeprefix("relax.")
    if operator == "nn.relu":
        return value.args[0], 0.0, math.inf
    if operator == "nn.relu6":
        return value.args[0], 0.0, 6.0
    if operator == "clip":
        low, high = plain(value.args[1]), plain(value.args[2])
        return None if low is None or high is None else (value.args[0], float(low), float(high))
    operands = list(value.args)
    if operator == "call_tir":
        operator = _called_operator(rw, value)
        operands = list(value.args[1].fields) if operator else []
    if operator in ("maximum", "minimum"):
        for data, bound in (operands, operands[::-1]):
            limit = rw.scalar(bound)
            if limit is not None and not math.isnan(limit) and rw.scalar(data) is None:
                return (data, limit, math.inf) if operator == "maximum" else (data, -math.inf, limit)
    return None


def _called_operator(rw: Rewriter, value: relax.Call) -> str:
    """``maximum`` or ``minimum`` if the PrimFunc that is called is exactly TOPI's for these operand shapes."""
    operands = value.args[1].fields
    if len(operands) != 2 or not all(is_tensor(o) for o in operands):
        return ""
    for operator, function in (("maximum", topi.maximum), ("minimum", topi.minimum)):
        if not value.args[0].name_hint.startswith(operator):
            continue
        builder = relax.BlockBuilder()
        params = [relax.Var(f"p{i}", o.ty) for i, o in enumerate(operands)]
        with builder.function("main", params):
            builder.emit_func_output(builder.emit_te(function, *params))
        expected = builder.get()[operator]
        if structural_equal(_comparable(rw.mod[value.args[0]]), _comparable(expected)):
            return operator
    return ""


def _comparable(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function without the attributes that say who may call it."""
    for attribute in ("global_symbol",):
        if function.attrs is not None and attribute in function.attrs:
            function = function.without_attr(attribute)
    return function
