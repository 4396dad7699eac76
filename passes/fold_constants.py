"""A compiler pass that computes at compile time what depends on weights and constants only, and keeps names."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import IRModule

from pumice.passes.numpy_operators import evaluate, plain
from pumice.passes.rewriting import Rewriter, dtype_of, is_tensor, op_name, rewrite, shape_of


@tvm.transform.module_pass(opt_level=0, name="pumice.FoldConstants")
class FoldConstants:
    """Weights in, weights out: ``matmul(x, permute_dims(w)) -> matmul(x, w)`` with ``w`` stored transposed.

    A folded value keeps the name of the weight it was computed from (of the largest, where there are several).
    Where the unfolded weight is still read, or two different values come from one weight, the later ones are
    called ``name#2``, ``name#3``. What depends on no weight becomes a constant.

    Not folded: ``dequantize(int8 weight)`` on the way to a convolution or matrix product, which is the
    quantized form that later passes match; operators that have no meaning in ``numpy_operators``; and what
    would blow up the model (a broadcast, a fill).
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Fold, and drop the weights that nobody reads any more."""
        return rewrite(mod, _fold)


_LAYERS = ("relax.matmul", "relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d")
_MOVES = ("relax.permute_dims", "relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.broadcast_to")
_SMALL = 1 << 16  # bytes that a fold may always make out of nothing
_GROWTH = 2  # times the operands' bytes that it may make otherwise


def _fold(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if not op_name(value) or not _is_worth_folding(rw, var, value):
        return None
    operands = [_operand(rw, arg) for arg in value.args]
    if any(o is None for o in operands):
        return None
    result = evaluate(value, var.ty, operands)
    if result is None:
        return None
    sources = [leaf for arg in value.args for leaf in (arg.fields if isinstance(arg, relax.Tuple) else [arg])]
    if isinstance(result, tuple):
        return relax.Tuple([rw.derived(sources, part) for part in result])
    return rw.derived(sources, result)


def _operand(rw: Rewriter, arg: relax.Expr) -> Any:
    if isinstance(arg, relax.Tuple):
        fields = [_operand(rw, field) for field in arg.fields]
        return None if any(f is None for f in fields) else tuple(fields)
    array = rw.array(arg)
    return plain(arg) if array is None else array


def _is_worth_folding(rw: Rewriter, var: relax.Var, value: relax.Call) -> bool:
    if op_name(value) == "relax.broadcast_to" and _feeds_layer(rw, var):
        return False  # a batch of copies of one weight: CanonicalizeLinear takes the copies away
    if op_name(value) == "relax.dequantize" and _is_quantized_weight(value.args[0]) and _feeds_layer(rw, var):
        return False
    if not is_tensor(var):
        return True
    made = int(np.prod(shape_of(var))) * np.dtype(dtype_of(var)).itemsize
    read = sum(array.nbytes for array in map(rw.array, value.args) if array is not None)
    if op_name(value) in ("relax.dequantize", "relax.astype", "relax.concat", "relax.stack"):
        return True  # they grow by the element type or by as much as they read
    return made <= max(_SMALL, _GROWTH * read)


def _is_quantized_weight(data: relax.Expr) -> bool:
    return len(shape_of(data)) > 1 and dtype_of(data) in ("int8", "uint8")


def _feeds_layer(rw: Rewriter, var: relax.Var) -> bool:
    for user, value in rw.users(var):
        if op_name(value) in _LAYERS or (op_name(value) in _MOVES and _feeds_layer(rw, user)):
            return True
    return False
