"""A compiler pass that recognises attention of several heads where a model spells it out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import IRModule

from pumice.passes.rewriting import Rewriter, dtype_of, is_tensor, op_name, rewrite, shape_of
from pumice.passes.views import View, head_layout, view


@tvm.transform.module_pass(opt_level=0, name="pumice.FuseAttention")
class FuseAttention:
    """``softmax(q @ k^T * scale + bias) @ v -> nn.attention(q', k', v', bias, scale)`` (Vaswani et al., 1706.03762).

    With q, k, v ``[B, H, T, C]`` (or B and H as one axis) and q', k', v' ``[B, T, H, C]``. Where q, k and v are the
    heads of projections ``[B, T, H*C]``, of one or of three, q', k' and v' are reshapes of these (or of slices), and
    what undoes the permutation afterwards goes too:

        permute_dims(reshape(x)) ... -> reshape(attention(reshape(x), ...), [B, T, H*C])

    The scale may multiply or divide q, k or the scores. The bias is what is added to the scores, and what hides them:
    ``where(mask, scores, -inf) -> scores + where(mask, 0, -inf)``. A softmax that is guarded against rows of -inf
    becomes ``where(row of bias is -inf, 0, attention)``; it hides the NaN of such rows alone.
    """

    def transform_module(self, mod: IRModule, ctx: tvm.transform.PassContext) -> IRModule:
        """Fuse every attention, then collapse what only moved its operands and its result."""
        return rewrite(rewrite(mod, _fuse), _collapse)


@dataclass(frozen=True)
class _Operand:
    """q, k or v: a value of the model, and the view ``[..., T, C]`` that it is, but for ``scale``, of a projection."""

    expr: relax.Expr
    view: View
    scale: float
    is_transposed: bool = False


@dataclass(frozen=True)
class _Scores:
    """``q @ k^T * scale + biases``."""

    q: _Operand
    k: _Operand
    scale: float
    rank: int
    biases: tuple[relax.Expr, ...] = field(default=())


def _fuse(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    if op_name(value) != "relax.matmul" or not is_tensor(var) or dtype_of(var) != "float32" or 0 in shape_of(var):
        return None
    softmax, is_guarded = _softmax(rw, value.args[0])
    scores = None if softmax is None else _scores(rw, softmax.args[0])
    if scores is None or len(shape_of(value.args[1])) != scores.rank:
        return None
    v = _operand(rw, value.args[1])
    leading = _batch_and_heads(scores.q.view, scores.k.view, v.view)
    if leading is None:
        return None
    bias = _bias(rw, scores, (*leading, *shape_of(value.args[0])[-2:]))
    if bias is None and scores.biases:
        return None
    (q, q_scale), (k, k_scale), (v_, v_scale) = (_by_head(rw, one, leading) for one in (scores.q, scores.k, v))
    scale = tirx.FloatImm("float32", scores.scale * q_scale * k_scale)
    result = rw.emit(relax.op.nn.attention(q, k, v_, bias, scale=scale), "attention")
    if v_scale != 1:
        result = rw.emit(relax.op.multiply(result, relax.const(v_scale, "float32")), "attention")
    if is_guarded and bias is not None and _may_hide_a_row(rw, bias):
        result = _guarded(rw, bias, result)
    back = relax.op.permute_dims(result, [0, 2, 1, 3])
    return back if scores.rank == 4 else relax.op.reshape(rw.emit(back), shape_of(var))


def _collapse(rw: Rewriter, var: relax.Var, value: relax.Expr) -> relax.Expr | None:
    """A chain of moves after an attention that moves nothing -> one reshape."""
    if op_name(value) not in ("relax.reshape", "relax.permute_dims", "relax.squeeze") or not is_tensor(var):
        return None
    source = view(value, rw.value)
    computed = op_name(rw.call(source.source)).removeprefix("relax.")
    if computed not in ("nn.attention", "nn.attention_bias", "where") or not source.is_flat_identity:
        return None
    return relax.op.reshape(source.source, shape_of(var))


def _softmax(rw: Rewriter, expr: relax.Expr) -> tuple[relax.Call | None, bool]:
    """The softmax over keys that alone gives ``expr``, and whether rows that it makes NaN are set to zero."""
    guard = rw.call(expr, "where")
    probabilities = expr if guard is None else guard.args[2]
    softmax = rw.call(probabilities, "nn.softmax")
    if softmax is None or int(softmax.attrs.axis) % len(shape_of(probabilities)) != len(shape_of(probabilities)) - 1:
        return None, False
    if guard is None:
        return (softmax, False) if rw.uses(expr) == 1 else (None, False)
    is_known = _number(rw, guard.args[1]) == 0 and rw.uses(expr) == 1
    is_nan = rw.call(guard.args[0], "isnan")
    if is_nan is not None and is_nan.args[0].same_as(probabilities):
        return (softmax, True) if is_known and rw.uses(probabilities) == 2 else (None, False)
    hides = _is_all_hidden(rw, guard.args[0], softmax.args[0])
    return (softmax, True) if is_known and hides and rw.uses(probabilities) == 1 else (None, False)


def _is_all_hidden(rw: Rewriter, expr: relax.Expr, scores: relax.Expr) -> bool:
    """Match ``max(scores != -inf, keys) == 0``."""
    equal = rw.call(expr, "equal")
    most = None if equal is None or _number(rw, equal.args[1]) != 0 else rw.call(equal.args[0], "max")
    if most is None or [int(a) % len(shape_of(scores)) for a in most.attrs.axis or ()] != [len(shape_of(scores)) - 1]:
        return False
    cast = rw.call(most.args[0], "astype")
    finite = rw.call(most.args[0] if cast is None else cast.args[0], "not_equal")
    return finite is not None and finite.args[0].same_as(scores) and _number(rw, finite.args[1]) == -math.inf


def _scores(rw: Rewriter, expr: relax.Expr) -> _Scores | None:
    call = rw.call(expr, "matmul", "multiply", "divide", "add", "where")
    if call is None:
        return None
    operator = op_name(call).removeprefix("relax.")
    if operator == "matmul":
        return _product(rw, call)
    if operator in ("multiply", "divide"):
        scaled = _scaled(rw, expr, call)
        inner = None if scaled is None else _scores(rw, scaled[0])
        return (
            None if inner is None or inner.biases or scaled is None else replace(inner, scale=inner.scale * scaled[1])
        )
    if operator == "add":
        for scores, bias in (call.args, call.args[::-1]):
            inner = _scores(rw, scores) if shape_of(scores) == shape_of(expr) else None
            if inner is not None:
                return replace(inner, biases=(*inner.biases, bias))
        return None
    return _hidden(rw, expr, call)


def _hidden(rw: Rewriter, expr: relax.Expr, where: relax.Call) -> _Scores | None:
    """``where(mask, scores, lowest)``, or with the two the other way round, as a bias of 0 and ``lowest``.

    ``lowest`` absorbs what is added to it, so that the sum is it: -inf, or the lowest number of a float type.
    """
    mask, *choices = where.args
    zero = relax.const(0.0, "float32")
    for which in (0, 1):
        lowest = _number(rw, choices[1 - which])
        inner = _scores(rw, choices[which]) if shape_of(choices[which]) == shape_of(expr) else None
        if inner is not None and lowest is not None and lowest < -1e30:
            hidden = [relax.const(lowest, "float32")] * 2
            hidden[which] = zero
            return replace(inner, biases=(*inner.biases, rw.emit(relax.op.where(mask, *hidden), "bias")))
    return None


def _product(rw: Rewriter, call: relax.Call) -> _Scores | None:
    left, right = call.args
    rank = len(shape_of(left))
    if rank not in (3, 4) or shape_of(left)[:-2] != shape_of(right)[:-2]:
        return None
    return _Scores(_operand(rw, left), _operand(rw, right, True), 1.0, rank)


def _operand(rw: Rewriter, expr: relax.Expr, is_transposed: bool = False) -> _Operand:
    scale = 1.0

    def through(value: relax.Call) -> relax.Expr | None:
        nonlocal scale
        scaled = _scaled(rw, value, value) if op_name(value) in ("relax.multiply", "relax.divide") else None
        scale *= 1.0 if scaled is None else scaled[1]
        return None if scaled is None else scaled[0]

    found = view(expr, rw.value, through)
    index = found.index.swapaxes(-1, -2) if is_transposed else found.index
    return _Operand(expr, View(found.source, index), scale, is_transposed)


def _scaled(rw: Rewriter, expr: relax.Expr, call: relax.Call) -> tuple[relax.Expr, float] | None:
    """What is scaled, and by how much, where ``call`` multiplies or divides by one number."""
    is_product = op_name(call) == "relax.multiply"
    for inner, factor in (call.args, call.args[::-1]) if is_product else (call.args,):
        number = _number(rw, factor)
        if number is not None and number != 0 and shape_of(inner) == shape_of(expr):
            return inner, number if is_product else 1 / number
    return None


def _number(rw: Rewriter, expr: relax.Expr) -> float | None:
    value = rw.array(expr)
    return float(value.ravel()[0]) if value is not None and value.size == 1 else None


def _batch_and_heads(q: View, k: View, v: View) -> tuple[int, int] | None:
    """B and H; where they are one axis, as the heads of the queries lie in their projection."""
    leading = q.index.shape[:-2]
    if k.index.shape[:-2] != leading or v.index.shape[:-2] != leading:
        return None
    if len(leading) == 2:
        return leading[0], leading[1]
    width = shape_of(q.source)[-1] if shape_of(q.source) else 1
    batch = len(np.unique(q.index[:, 0, 0] // width))
    return None if leading[0] % batch else (batch, leading[0] // batch)


def _by_head(rw: Rewriter, operand: _Operand, leading: tuple[int, int]) -> tuple[relax.Expr, float]:
    """An operand as ``[B, T, H, C]`` and what it must be scaled by: its projection, if the heads lie in that so."""
    heads = View(operand.view.source, operand.view.index.reshape(*leading, *operand.view.index.shape[-2:]))
    batch, count, length, size = heads.index.shape
    layout = head_layout(heads)
    is_interleaved = layout is not None and layout.stride != size
    if layout is None or (is_interleaved and count * layout.stride != shape_of(heads.source)[-1]):
        shape, axes = shape_of(operand.expr), (0, 3, 1, 2) if operand.is_transposed else (0, 2, 1, 3)
        whole = operand.expr if len(shape) == 4 else rw.emit(relax.op.reshape(operand.expr, [*leading, *shape[1:]]))
        return rw.emit(relax.op.permute_dims(whole, axes), "heads"), 1.0
    source, width = heads.source, shape_of(heads.source)[-1]
    shape = (batch, length, count, size)
    if width == count * size:
        return source if shape_of(source) == shape else rw.emit(relax.op.reshape(source, shape), "heads"), operand.scale
    if layout.stride == size:
        axis, end = len(shape_of(source)) - 1, layout.first + count * size
        part = rw.emit(relax.op.strided_slice(source, [axis], [layout.first], [end]), "slice")
        return rw.emit(relax.op.reshape(part, shape), "heads"), operand.scale
    first = layout.first
    whole = rw.emit(relax.op.reshape(source, [batch, length, count, layout.stride]), "heads")
    return rw.emit(relax.op.strided_slice(whole, [3], [first], [first + size]), "slice"), operand.scale


def _bias(rw: Rewriter, scores: _Scores, shape: tuple[int, ...]) -> relax.Expr | None:
    """The sum of the biases, four axes; None where there is none or one does not fit."""
    total = None
    for bias in scores.biases:
        repeated = rw.call(bias, "broadcast_to")
        bias = bias if repeated is None or len(shape_of(repeated.args[0])) == 0 else repeated.args[0]
        own = shape_of(bias)
        if dtype_of(bias) != "float32" or not own or own[-1] != shape[-1]:
            return None
        if scores.rank == 3 and len(own) == 3 and own[0] != 1:
            own = (*shape[:2], *own[1:])
        own = (1,) * (4 - len(own)) + own
        if len(own) != 4 or any(d not in (1, whole) for d, whole in zip(own, shape, strict=True)):
            return None
        bias = bias if shape_of(bias) == own else rw.emit(relax.op.reshape(bias, own), "bias")
        total = bias if total is None else rw.emit(relax.op.add(total, bias), "bias")
    return total


def _may_hide_a_row(rw: Rewriter, bias: relax.Expr) -> bool:
    """Whether all of a row may be -inf, as far as that is known now."""
    value = rw.array(bias)
    if value is not None:
        return bool((value == -np.inf).all(-1).any())
    choice = rw.call(bias, "where")
    numbers = [] if choice is None else [_number(rw, one) for one in choice.args[1:]]
    return not numbers or None in numbers or -math.inf in numbers


def _guarded(rw: Rewriter, bias: relax.Expr, result: relax.Expr) -> relax.Expr:
    """0 where all of a query's row of the bias is -inf."""
    seen = rw.emit(relax.op.not_equal(bias, relax.const(-math.inf, "float32")), "seen")
    # Of integers: TVM's maximum of floats starts at the lowest that is finite.
    most = rw.emit(relax.op.max(rw.emit(relax.op.astype(seen, "int8"), "seen"), [3], keepdims=True), "most")
    hidden = rw.emit(relax.op.equal(most, relax.const(0, "int8")), "hidden")
    by_query = rw.emit(relax.op.permute_dims(hidden, [0, 2, 1, 3]), "hidden")
    return rw.emit(relax.op.where(by_query, relax.const(0.0, "float32"), result), "guarded")
