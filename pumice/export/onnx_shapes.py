"""What each Relax operator that only moves elements is in ONNX: shapes, slices, concatenations, indices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import helper
from tvm import relax

from pumice.export.onnx_graph import OnnxGraph, Value
from pumice.export.onnx_layers import Rule
from pumice.passes.numpy_operators import plain
from pumice.passes.rewriting import dtype_of, shape_of


def cast_to(graph: OnnxGraph, value: str, dtype: str) -> str:
    """A value of another type."""
    return graph.node("Cast", [value], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def along_axis(op_type: str) -> Rule:
    """The operator of the same operands and the same single axis."""

    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        return graph.node(op_type, [graph.read(operand) for operand in call.args], axis=int(call.attrs.axis))

    return rule


def axes_of(graph: OnnxGraph, call: relax.Call) -> list[str]:
    """The axes of a reduction as an operand; none for all of them."""
    axes = call.attrs.axis
    return [] if axes is None else [graph.vector(int(axis) for axis in axes)]


def sliced(
    graph: OnnxGraph, x: str, axes: Sequence[int], begin: Sequence[int], end: Sequence[int], steps: Sequence[int]
) -> str:
    """Part of ``x`` along some axes."""
    return graph.node("Slice", [x, *(graph.vector(numbers) for numbers in (begin, end, axes, steps))])


def parts_of(graph: OnnxGraph, operand: relax.Expr) -> list[relax.Expr]:
    """The tensors of a tuple, written out in the call or bound before."""
    found = graph.flow.value.get(operand, operand) if isinstance(operand, relax.Var) else operand
    if not isinstance(found, relax.Tuple):
        raise graph.refusal("reads a tuple that an operator makes")
    return list(found.fields)


# Shapes


def _reshape(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    return graph.node("Reshape", [graph.read(call.args[0]), graph.vector(shape_of(var))])


def _expand_dims(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    axes = graph.vector(int(axis) for axis in call.attrs.axis)
    return graph.node("Unsqueeze", [graph.read(call.args[0]), axes])


def _squeeze(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    return graph.node("Squeeze", [graph.read(call.args[0]), *axes_of(graph, call)])


def _permute(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    rank = len(shape_of(var))
    axes = call.attrs.axes
    order = list(reversed(range(rank))) if axes is None else [int(axis) % rank for axis in axes]
    return graph.node("Transpose", [graph.read(call.args[0])], perm=order)


def _broadcast(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    return graph.node("Expand", [graph.read(call.args[0]), graph.vector(shape_of(var))])


def _filled(operand: int | None, value: float = 0) -> Rule:
    """A tensor of one value: that of an operand, or a number."""

    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        number = graph.scalar(value, var) if operand is None else graph.read(call.args[operand])
        if operand is not None and dtype_of(call.args[operand]) != dtype_of(var):
            number = cast_to(graph, number, dtype_of(var))
        return graph.node("Expand", [number, graph.vector(shape_of(var))])

    return rule


def _arange(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    start, stop, step = (plain(number) for number in call.args)
    if None in (start, stop, step):
        raise graph.refusal("has a bound that is computed while running")
    return graph.constant(np.arange(start, stop, step).astype(dtype_of(var)))


def _shape_of(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    return graph.vector(shape_of(call.args[0]))


def _shape_to_tensor(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    shape = call.args[0]
    return graph.vector(graph.integers(shape)) if isinstance(shape, relax.ShapeExpr) else graph.read(shape)


def _concat(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    parts = [graph.read(part) for part in parts_of(graph, call.args[0])]
    return graph.node("Concat", parts, axis=int(call.attrs.axis or 0))


def _stack(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    axis = int(call.attrs.axis or 0)
    parts = [
        graph.node("Unsqueeze", [graph.read(part), graph.vector([axis])]) for part in parts_of(graph, call.args[0])
    ]
    return graph.node("Concat", parts, axis=axis)


def _split(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    axis = int(call.attrs.axis)
    sizes = [int(field.shape[axis]) for field in var.ty.fields]
    return graph.nodes("Split", [graph.read(call.args[0]), graph.vector(sizes)], len(sizes), axis=axis)


def _strided_slice(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    axes, begin, end = (graph.integers(operand) for operand in call.args[1:4])
    steps = graph.integers(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    return sliced(graph, graph.read(call.args[0]), axes, begin, end, steps)


def _flip(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    axis = int(call.attrs.axis)
    return sliced(graph, graph.read(call.args[0]), [axis], [-1], [-shape_of(var)[axis] - 1], [-1])


def _tile(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    repeats = [int(count) for count in call.attrs.repeats]
    shape = shape_of(call.args[0])
    x, missing = graph.read(call.args[0]), len(repeats) - len(shape)
    if missing > 0:
        x = graph.node("Reshape", [x, graph.vector([*[1] * missing, *shape])])
    return graph.node("Tile", [x, graph.vector([*[1] * -missing, *repeats])])


def _triangle(upper: bool) -> Rule:
    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        (diagonal,) = graph.integers(call.args[1])
        return graph.node(
            "Trilu", [graph.read(call.args[0]), graph.constant(np.array(diagonal, np.int64))], upper=int(upper)
        )

    return rule


def _pad(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    mode = _PAD_MODES.get(str(call.attrs.pad_mode))
    if mode is None:
        raise graph.refusal(f"pads by {call.attrs.pad_mode}")
    widths = [int(width) for width in call.attrs.pad_width]
    inputs = [graph.read(call.args[0]), graph.vector([*widths[0::2], *widths[1::2]])]
    if mode == "constant":
        inputs.append(graph.scalar(float(call.attrs.pad_value), var))
    return graph.node("Pad", inputs, mode=mode)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


# Indices


def _take(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """ONNX refuses an index outside of the table, where Relax clips it, or reads what happens to be there."""
    data, index = (graph.read(operand) for operand in call.args)
    if call.attrs.axis is None:
        return graph.node("Gather", [graph.node("Reshape", [data, graph.vector([-1])]), index], axis=0)
    return graph.node("Gather", [data, index], axis=int(call.attrs.axis))


def _gather_nd(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    data, index = (graph.read(operand) for operand in call.args)
    index = index if dtype_of(call.args[1]) == "int64" else cast_to(graph, index, "int64")
    return graph.node("GatherND", [data, index], batch_dims=int(call.attrs.batch_dims))


def _index_tensor(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """``data[i, j, ...]`` on the first axes: the indices, broadcast together, side by side."""
    indices = parts_of(graph, call.args[1])
    shape = np.broadcast_shapes(*(shape_of(index) for index in indices))
    columns = []
    for index in indices:
        value = graph.node("Expand", [cast_to(graph, graph.read(index), "int64"), graph.vector(shape)])
        columns.append(graph.node("Unsqueeze", [value, graph.vector([-1])]))
    return graph.node("GatherND", [graph.read(call.args[0]), graph.node("Concat", columns, axis=-1)])


def _scatter_elements(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    reductions = {"update": "none", "add": "add", "mul": "mul", "min": "min", "max": "max"}
    reduction = reductions.get(str(call.attrs.reduction))
    if reduction is None:
        raise graph.refusal(f"combines by {call.attrs.reduction}")
    inputs = [graph.read(operand) for operand in call.args]
    return graph.node("ScatterElements", inputs, axis=int(call.attrs.axis), reduction=reduction)


def _slice_scatter(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """The elements of the slice, by their places along its axis."""
    axis, shape, part = int(call.attrs.axis) % len(shape_of(var)), shape_of(var), shape_of(call.args[1])
    begin, end, step = (graph.integers(number)[0] for number in call.args[2:5])
    places = np.arange(shape[axis])[begin:end:step]
    column = [1] * len(shape)
    column[axis] = len(places)
    index = graph.node("Expand", [graph.constant(places.reshape(column).astype(np.int64)), graph.vector(part)])
    return graph.node("ScatterElements", [graph.read(call.args[0]), index, graph.read(call.args[1])], axis=axis)


def _one_hot(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    on, off = (plain(value) for value in call.args[1:3])
    depth = graph.constant(np.array(int(call.attrs.depth), np.int64))
    values = graph.constant(np.array([off, on], dtype_of(var)))
    return graph.node("OneHot", [graph.read(call.args[0]), depth, values], axis=int(call.attrs.axis))


SHAPES: dict[str, Rule] = {
    # Shapes
    **dict.fromkeys(("reshape", "flatten", "nn.batch_flatten"), _reshape),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "permute_dims": _permute,
    "broadcast_to": _broadcast,
    "full": _filled(1),
    "full_like": _filled(1),
    "zeros": _filled(None, 0),
    "zeros_like": _filled(None, 0),
    "ones": _filled(None, 1),
    "ones_like": _filled(None, 1),
    "arange": _arange,
    "shape_of": _shape_of,
    "shape_to_tensor": _shape_to_tensor,
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "strided_slice": _strided_slice,
    "flip": _flip,
    "tile": _tile,
    "tril": _triangle(False),
    "triu": _triangle(True),
    "nn.pad": _pad,
    # Indices
    "take": _take,
    "gather_elements": along_axis("GatherElements"),
    "gather_nd": _gather_nd,
    "index_tensor": _index_tensor,
    "scatter_elements": _scatter_elements,
    "slice_scatter": _slice_scatter,
    "one_hot": _one_hot,
}  # fmt: skip
