"""Where the elements of a tensor come from, followed back through the operators that only move them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from pumice.passes.dataflow import operator_name
from pumice.passes.numpy_operators import plain
from pumice.passes.rewriting import shape_of

Lookup = Callable[[relax.Expr], Any]  # an expression or None; TVM carries no types


@dataclass(frozen=True)
class View:
    """A tensor whose element ``i`` is element ``index[i]`` of the flat ``source``."""

    source: relax.Expr
    index: np.ndarray

    @property
    def is_flat_identity(self) -> bool:
        """Whether it is nothing but a reshape of its source."""
        flat = self.index.ravel()
        return bool(flat.size == np.prod(shape_of(self.source)) and (flat == np.arange(flat.size)).all())


@dataclass(frozen=True)
class HeadLayout:
    """``view[b, h, t, c] == source[b * T + t, first + h * stride + c]``, the source as a matrix of its last axis."""

    first: int
    stride: int


def view(expr: relax.Expr, value_of: Lookup, through: Lookup | None = None) -> View:
    """The view that ``expr`` is of the first tensor on the way back that is not just moved.

    ``value_of`` gives what a variable is bound to. ``through`` may name, for another value, the operand of the same
    shape to go on with.
    """
    value = value_of(expr)
    if isinstance(value, relax.TupleGetItem):
        parts = value_of(value.tuple_value)
        if operator_name(parts) == "split":
            base = view(parts.args[0], value_of, through)
            return View(base.source, np.split(base.index, _cuts(parts), int(parts.attrs.axis))[value.index])
    operand = through(value) if through is not None and isinstance(value, relax.Call) else None
    if operand is not None:
        return view(operand, value_of, through)
    move = _MOVES.get(operator_name(value))
    if move is not None and _is_static(value):
        base = view(value.args[0], value_of, through)
        return View(base.source, move(value, base.index, shape_of(expr)))
    shape = shape_of(expr)
    return View(expr, np.arange(int(np.prod(shape))).reshape(shape))


def head_layout(found: View) -> HeadLayout | None:
    """How the heads of a view ``[B, H, T, C]`` lie in its source; None where they do not lie like heads."""
    batch, heads, length, size = found.index.shape
    width = shape_of(found.source)[-1] if shape_of(found.source) else 1
    first = int(found.index[0, 0, 0, 0])
    stride = int(found.index[0, 1, 0, 0]) - first if heads > 1 else size
    b, h, t, c = np.ogrid[:batch, :heads, :length, :size]
    expected = (b * length + t) * width + first + h * stride + c
    is_whole = int(np.prod(shape_of(found.source))) == batch * length * width
    fits = stride >= size and first + (heads - 1) * stride + size <= width
    return HeadLayout(first, stride) if is_whole and fits and np.array_equal(found.index, expected) else None


def _reshape(call: relax.Call, index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return index.reshape(shape)


def _permute(call: relax.Call, index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return index.transpose(None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes])


def _slice(call: relax.Call, index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    axes, begins, ends = ([plain(field) for field in argument.fields] for argument in call.args[1:4])
    cut = [slice(None)] * index.ndim
    for axis, begin, end in zip(axes, begins, ends, strict=True):
        cut[axis] = slice(begin, end)
    return index[tuple(cut)]


def _take(call: relax.Call, index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(np.take(index, int(plain(call.args[1])), axis=int(call.attrs.axis)))


def _is_static(call: relax.Call) -> bool:
    """Whether what the call takes is known, and of the plain kind: one index, slices forward without steps."""
    if operator_name(call) == "take":
        which = plain(call.args[1])
        if call.attrs.axis is None or not isinstance(which, np.ndarray) or which.shape != ():
            return False
        return 0 <= int(which) < shape_of(call.args[0])[int(call.attrs.axis)]
    if operator_name(call) == "strided_slice":
        steps = [plain(step) for step in call.args[4].fields] if len(call.args) > 4 else []
        begins = [plain(begin) for begin in call.args[2].fields]
        return all(step == 1 for step in steps) and all(begin is not None and begin >= 0 for begin in begins)
    return True


def _cuts(split: relax.Call) -> list[int]:
    how = split.attrs.indices_or_sections
    if plain(how) is None:
        return [int(cut) for cut in how]
    length = shape_of(split.args[0])[int(split.attrs.axis)]
    part = -(-length // int(how))
    return list(range(part, length, part))


_MOVES: dict[str, Callable[[relax.Call, np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "reshape": _reshape,
    "flatten": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "permute_dims": _permute,
    "strided_slice": _slice,
    "take": _take,
}
