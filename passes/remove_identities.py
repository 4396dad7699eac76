"""A compiler pass that removes what changes nothing: dropout, reshapes to the same shape, casts to the same type."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.rewriting import Rewriter, dtype_of, is_tensor, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.RemoveIdentities")
class RemoveIdentities:
    """Remove or merge the operators that only move data, where they move nothing or move it twice.

    ``dropout(x)[0] -> x``; reshape, broadcast_to, squeeze, expand_dims, permute_dims, astype, concat and pad that
    change nothing ``-> x``; ``reshape(reshape(x)) -> reshape(x)``; ``permute_dims(permute_dims(x)) ->
    permute_dims(x)``; ``expand_dims(squeeze(x)) -> x``; ``x * 1``, ``x / 1``, ``x + 0``, ``x - 0 -> x``.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Remove them all, chains included."""
        return rewrite(mod, _remove)


_SAME_SHAPE = ("reshape", "broadcast_to", "squeeze", "expand_dims", "flatten", "nn.batch_flatten", "nn.pad", "concat")
_NEUTRAL = {"multiply": 1.0, "divide": 1.0, "add": 0.0, "subtract": 0.0}


def _remove(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    dropout = rw.item(value, 0, "nn.dropout")
    if dropout is not None:
        return dropout.args[0]
    operator = op_name(value).removeprefix("relax.")
    if not operator or not is_tensor(var):
        return None
    if operator in _SAME_SHAPE:
        return _same_shape(rw, var, value, operator)
    if operator == "astype":
        return value.args[0] if dtype_of(value.args[0]) == dtype_of(var) else None
    if operator == "permute_dims":
        return _permutation(rw, value)
    if operator in _NEUTRAL:
        return _neutral_operand(rw, var, value, operator)
    return None


def _same_shape(rw: Rewriter, var: relax.Var, value: relax.Call, operator: str) -> relax.Expr | None:
    data = value.args[0]
    if isinstance(data, relax.Tuple):  # concat
        return data.fields[0] if len(data.fields) == 1 else None
    if not is_tensor(data):
        return None
    if shape_of(data) == shape_of(var):
        return data
    if operator in ("reshape", "flatten", "nn.batch_flatten"):
        inner = rw.call(data, "reshape", "flatten", "nn.batch_flatten", "squeeze", "expand_dims")
        if inner is None:
            return relax.op.reshape(data, shape_of(var)) if operator != "reshape" else None
        source = inner.args[0]
        return source if shape_of(source) == shape_of(var) else relax.op.reshape(source, shape_of(var))
    if operator in ("squeeze", "expand_dims"):
        # These two are reshapes, so whichever way a pair of them comes back to the start it is the identity.
        inner = rw.call(data, "squeeze", "expand_dims", "reshape")
        if inner is not None and shape_of(inner.args[0]) == shape_of(var):
            return inner.args[0]
    return None


def _permutation(rw: Rewriter, value: relax.Call) -> relax.Expr | None:
    data = value.args[0]
    if not is_tensor(data):
        return None
    axes = _axes_of(value)
    inner = rw.call(data, "permute_dims")
    if inner is not None:
        data = inner.args[0]
        axes = [_axes_of(inner)[a] for a in axes]
    if axes == sorted(axes):
        return data
    return None if inner is None else relax.op.permute_dims(data, axes)


def _axes_of(value: relax.Call) -> list[int]:
    rank = len(shape_of(value.args[0]))
    if value.attrs.axes is None:
        return list(reversed(range(rank)))
    return [int(a) % rank for a in value.attrs.axes]


def _neutral_operand(rw: Rewriter, var: relax.Var, value: relax.Call, operator: str) -> relax.Expr | None:
    left, right = value.args
    if rw.scalar(right) == _NEUTRAL[operator] and is_tensor(left) and shape_of(left) == shape_of(var):
        return left
    commutes = operator in ("multiply", "add")
    if commutes and rw.scalar(left) == _NEUTRAL[operator] and is_tensor(right) and shape_of(right) == shape_of(var):
        return right
    return None
