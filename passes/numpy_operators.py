"""What Relax operators mean, in numpy: enough of them to compute at compile time what weights alone determine.

An operator that is not in the table is not an error; its call just stays in the graph and runs at run time.
Arithmetic is done in float64 and rounded once to the result's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst

Value = np.ndarray | tuple[np.ndarray, ...]


def evaluate(call: relax.Call, ty: tvm.ir.Type, operands: list[Any]) -> Value | None:
    """The value of ``call``, whose result has the type ``ty``, or None where the table does not know it.

    ``operands`` are the call's arguments as numpy arrays, tuples of arrays, shapes (tuples of int) and numbers.
    """
    operator = str(call.op.name).removeprefix("relax.")
    function = _TABLE.get(operator)
    if function is None:
        return None
    result = function(call.attrs, *operands)
    if isinstance(result, tuple):
        fields = zip(result, ty.fields, strict=True)
        return tuple(_rounded(value, field) for value, field in fields)
    return _rounded(result, ty)


def move(call: relax.Call, data: np.ndarray) -> np.ndarray | None:
    """Do to ``data``, of any element type, what ``call`` does to its first operand; None if it does not just move."""
    operator = str(call.op.name).removeprefix("relax.")
    if operator not in MOVES:
        return None
    result = _TABLE[operator](call.attrs, data, *[plain(arg) for arg in call.args[1:]])
    return np.asarray(result)


def plain(expr: relax.Expr) -> Any:
    """A constant, shape, tuple or number of the graph as a Python value; None for what is not one."""
    if isinstance(expr, GenericConst):
        return expr.value.numpy() if isinstance(expr.ty, relax.TensorType) else None
    if isinstance(expr, tirx.IntImm | tirx.FloatImm):
        return expr.value
    if isinstance(expr, relax.ShapeExpr):
        values = [plain(d) for d in expr.values]
        return None if None in values else tuple(values)
    return None


def _rounded(value: Any, ty: relax.TensorType) -> np.ndarray:
    dtype = np.dtype(str(ty.dtype))
    value = np.asarray(value)
    if np.issubdtype(dtype, np.integer) and np.issubdtype(value.dtype, np.floating):
        value = np.trunc(value)
    return np.asarray(value.astype(dtype, copy=False))


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on float64 in place of narrower floats; integers stay integers."""

    def wide(attrs: Any, *operands: Any) -> Any:
        arrays = [np.asarray(o) for o in operands]
        exact = [a.astype(np.float64) if np.issubdtype(a.dtype, np.floating) else a for a in arrays]
        with np.errstate(all="ignore"):
            return function(*exact)

    return wide


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.issubdtype(a.dtype, np.floating):
        return np.asarray(np.divide(a, b))
    safe = np.where(b == 0, 1, b)  # what an integer division by zero gives is not defined; it must not stop us
    return np.asarray(np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe)))


def _reduction(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(attrs: Any, x: np.ndarray) -> np.ndarray:
        axis = None if attrs.axis is None else tuple(int(a) for a in attrs.axis)
        wide = x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x
        return np.asarray(function(wide, axis=axis, keepdims=bool(attrs.keepdims)))

    return reduce


def _axes(value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(int(a) for a in value)


def _permute_dims(attrs: Any, x: np.ndarray) -> np.ndarray:
    return np.transpose(x, _axes(attrs.axes))


def _expand_dims(attrs: Any, x: np.ndarray) -> np.ndarray:
    return np.expand_dims(x, _axes(attrs.axis) or ())


def _squeeze(attrs: Any, x: np.ndarray) -> np.ndarray:
    return np.squeeze(x, _axes(attrs.axis))


def _concat(attrs: Any, tensors: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate(tensors, axis=None if attrs.axis is None else int(attrs.axis))


def _stack(attrs: Any, tensors: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.stack(tensors, axis=0 if attrs.axis is None else int(attrs.axis))


def _split(attrs: Any, x: np.ndarray) -> tuple[np.ndarray, ...]:
    how = attrs.indices_or_sections
    if isinstance(how, tirx.IntImm):
        # Relax makes all parts but the last equal, rounded up.
        length = x.shape[int(attrs.axis)]
        part = -(-length // int(how))
        return tuple(np.split(x, range(part, length, part), axis=int(attrs.axis)))
    return tuple(np.split(x, [int(i) for i in how], axis=int(attrs.axis)))


def _strided_slice(attrs: Any, x: np.ndarray, axes: Any, begin: Any, end: Any, strides: Any = None) -> np.ndarray:
    steps = strides if strides is not None else [1] * len(axes)
    index = [slice(None)] * x.ndim
    for axis, start, stop, step in zip(axes, begin, end, steps, strict=True):
        length = x.shape[axis]
        backwards_to_start = step < 0 and stop < -length
        index[axis] = slice(start, None if backwards_to_start else stop, step)
    return x[tuple(index)]


def _take(attrs: Any, x: np.ndarray, indices: Any) -> np.ndarray:
    axis = None if attrs.axis is None else int(attrs.axis)
    indices = np.asarray(indices)
    length = x.size if axis is None else x.shape[axis]
    if str(attrs.mode) == "wrap":
        indices = indices % length
    return np.asarray(np.take(x, np.clip(indices, -length, length - 1), axis=axis))


def _astype(attrs: Any, x: np.ndarray) -> np.ndarray:
    return x  # rounded to the result's type like every result


def _full(attrs: Any, shape: tuple[int, ...], value: np.ndarray) -> np.ndarray:
    return np.full(shape, value)


def _full_like(attrs: Any, x: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.full(x.shape, value)


def _dequantize(attrs: Any, x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    def along_axis(values: np.ndarray) -> np.ndarray:
        if values.size == 1:
            return values.reshape(())
        shape = [1] * x.ndim
        shape[int(attrs.axis)] = values.size
        return values.reshape(shape)

    return (x.astype(np.float64) - along_axis(zero_point).astype(np.float64)) * along_axis(scale).astype(np.float64)


MOVES = ("permute_dims", "reshape", "expand_dims", "squeeze", "broadcast_to")

_TABLE: dict[str, Callable[..., Any]] = {
    "permute_dims": _permute_dims,
    "reshape": lambda attrs, x, shape: x.reshape(shape),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "broadcast_to": lambda attrs, x, shape: np.broadcast_to(x, shape),
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "strided_slice": _strided_slice,
    "take": _take,
    "astype": _astype,
    "full": _full,
    "full_like": _full_like,
    "zeros": lambda attrs, shape: np.zeros(shape),
    "ones": lambda attrs, shape: np.ones(shape),
    "zeros_like": lambda attrs, x: np.zeros(x.shape),
    "ones_like": lambda attrs, x: np.ones(x.shape),
    "arange": lambda attrs, start, stop, step: np.arange(start, stop, step),
    "shape_to_tensor": lambda attrs, shape: np.array(shape, np.int64),
    "dequantize": _dequantize,
    "where": _arithmetic(np.where),
    "add": _arithmetic(np.add),
    "subtract": _arithmetic(np.subtract),
    "multiply": _arithmetic(np.multiply),
    "divide": _arithmetic(_divide),
    "power": _arithmetic(np.power),
    "maximum": _arithmetic(np.maximum),
    "minimum": _arithmetic(np.minimum),
    "negative": _arithmetic(np.negative),
    "abs": _arithmetic(np.abs),
    "exp": _arithmetic(np.exp),
    "log": _arithmetic(np.log),
    "sqrt": _arithmetic(np.sqrt),
    "rsqrt": _arithmetic(lambda x: 1 / np.sqrt(x)),
    "square": _arithmetic(np.square),
    "tanh": _arithmetic(np.tanh),
    "sigmoid": _arithmetic(lambda x: 1 / (1 + np.exp(-x))),
    "isnan": _arithmetic(np.isnan),
    "isinf": _arithmetic(np.isinf),
    "isfinite": _arithmetic(np.isfinite),
    "equal": _arithmetic(np.equal),
    "not_equal": _arithmetic(np.not_equal),
    "less": _arithmetic(np.less),
    "less_equal": _arithmetic(np.less_equal),
    "greater": _arithmetic(np.greater),
    "greater_equal": _arithmetic(np.greater_equal),
    "logical_not": _arithmetic(np.logical_not),
    "logical_and": _arithmetic(np.logical_and),
    "logical_or": _arithmetic(np.logical_or),
    "clip": _arithmetic(np.clip),
    "nn.leakyrelu": lambda attrs, x: np.where(x < 0, x * float(attrs.alpha), x),
    "sum": _reduction(np.sum),
    "mean": _reduction(np.mean),
    "max": _reduction(np.max),
    "min": _reduction(np.min),
    "prod": _reduction(np.prod),
    "variance": _reduction(np.var),
    "std": _reduction(np.std),
}
