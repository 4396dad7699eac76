"""What each Relax operator is in ONNX: arithmetic, comparisons, reductions; with ``SHAPES`` and ``LAYERS`` all of them.

A rule gets the graph, the variable and the call, adds nodes, and gives the name of the result. What has no rule here
or in these is refused by name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto
from tvm import relax, tirx

from pumice.export.onnx_graph import OnnxGraph, Value
from pumice.export.onnx_layers import LAYERS, Rule
from pumice.export.onnx_shapes import SHAPES, along_axis, axes_of, cast_to, parts_of, sliced
from pumice.passes.numpy_operators import plain
from pumice.passes.rewriting import dtype_of, shape_of

_NARROW = ("int8", "uint8")


# Element by element


def _direct(op_type: str, **attributes: Any) -> Rule:
    """The ONNX operator that takes the same operands and means the same."""

    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        return graph.node(op_type, [graph.read(operand) for operand in call.args], **attributes)

    return rule


def _chain(*op_types: str) -> Rule:
    """The operators one after the other, as ``Sqrt``, ``Reciprocal``."""

    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        inputs = [graph.read(operand) for operand in call.args]
        for op_type in op_types:
            inputs = [graph.node(op_type, inputs)]
        return inputs[0]

    return rule


def _compare(*op_types: str) -> Rule:
    """A comparison; of bytes as int32, which runtimes know how to compare."""

    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        inputs = [graph.read(operand) for operand in call.args]
        if dtype_of(call.args[0]) in _NARROW:
            inputs = [graph.node("Cast", [value], to=TensorProto.INT32) for value in inputs]
        for op_type in op_types:
            inputs = [graph.node(op_type, inputs)]
        return inputs[0]

    return rule


def _bitwise(of_integers: str, of_truth: str) -> Rule:
    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        op_type = of_truth if dtype_of(var) == "bool" else of_integers
        return graph.node(op_type, [graph.read(operand) for operand in call.args])

    return rule


def _clip(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    bounds = [graph.scalar(float(plain(bound)), var) for bound in call.args[1:]]
    return graph.node("Clip", [graph.read(call.args[0]), *bounds])


def _silu(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    x = graph.read(call.args[0])
    return graph.node("Mul", [x, graph.node("Sigmoid", [x])])


def _square(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    x = graph.read(call.args[0])
    return graph.node("Mul", [x, x])


def _trunc(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    x = graph.read(call.args[0])
    return graph.node("Mul", [graph.node("Sign", [x]), graph.node("Floor", [graph.node("Abs", [x])])])


def _is_finite(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    x = graph.read(call.args[0])
    return graph.node("Not", [graph.node("Or", [graph.node("IsInf", [x]), graph.node("IsNaN", [x])])])


def _remainder(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """``floor_mod``: with the sign of the divisor, which ONNX's Mod has for integers."""
    x, y = (graph.read(operand) for operand in call.args)
    if not dtype_of(var).startswith("float"):
        return graph.node("Mod", [x, y])
    whole = graph.node("Floor", [graph.node("Div", [x, y])])
    return graph.node("Sub", [x, graph.node("Mul", [whole, y])])


def _floor_divide(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    x, y = (graph.read(operand) for operand in call.args)
    if dtype_of(var).startswith("float"):
        return graph.node("Floor", [graph.node("Div", [x, y])])
    return graph.node("Div", [graph.node("Sub", [x, graph.node("Mod", [x, y])]), y])


def _atan2(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """``atan(y / x)``, half a turn further where x is negative; (0, 0) gives 0. It ignores the sign of a zero."""
    y, x = (graph.read(operand) for operand in call.args)
    zero, half = graph.scalar(0.0, var), graph.scalar(math.pi, var)
    turn = graph.node("Where", [graph.node("Less", [y, zero]), graph.node("Neg", [half]), half])
    turn = graph.node("Where", [graph.node("Less", [x, zero]), turn, zero])
    angle = graph.node("Add", [graph.node("Atan", [graph.node("Div", [y, x])]), turn])
    origin = graph.node("And", [graph.node("Equal", [x, zero]), graph.node("Equal", [y, zero])])
    return graph.node("Where", [origin, zero, angle])


def _cast(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    return cast_to(graph, graph.read(call.args[0]), dtype_of(var))


def _leaky_relu(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    return graph.node("LeakyRelu", [graph.read(call.args[0])], alpha=float(call.attrs.alpha))


# Along axes


def _reduce(op_type: str) -> Rule:
    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        inputs = [graph.read(call.args[0]), *axes_of(graph, call)]
        return graph.node(op_type, inputs, keepdims=int(call.attrs.keepdims))

    return rule


def _called(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """A function that says what it computes: the importer's maximum and minimum along axes."""
    function = graph.function(call.args[0])
    operator = "" if function.attrs is None else str(function.attrs.get("pumice.reduce", ""))
    if operator not in ("max", "min"):
        raise graph.refusal(f"calls the function {call.args[0].name_hint}, which has no form in ONNX")
    (x,) = call.args[1].fields
    axes = graph.vector(int(axis) for axis in function.attrs["axes"])
    kept = int(function.attrs["keepdims"])
    return graph.node("ReduceMax" if operator == "max" else "ReduceMin", [graph.read(x), axes], keepdims=kept)


def _variance(*end: str) -> Rule:
    """The mean squared distance from the mean, and what comes behind it."""

    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        x, axes = graph.read(call.args[0]), axes_of(graph, call)
        distance = graph.node("Sub", [x, graph.node("ReduceMean", [x, *axes], keepdims=1)])
        squared = graph.node("Mul", [distance, distance])
        value = graph.node("ReduceMean", [squared, *axes], keepdims=int(call.attrs.keepdims))
        for op_type in end:
            value = graph.node(op_type, [value])
        return value

    return rule


def _arg_extreme(op_type: str) -> Rule:
    def rule(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
        x, axis = graph.read(call.args[0]), call.attrs.axis
        if axis is not None:
            found = graph.node(op_type, [x], axis=int(axis), keepdims=int(call.attrs.keepdims))
        else:
            flat = graph.node("Reshape", [x, graph.vector([-1])])
            found = graph.node("Reshape", [graph.node(op_type, [flat], axis=0), graph.vector(shape_of(var))])
        return found if dtype_of(var) == "int64" else cast_to(graph, found, dtype_of(var))

    return rule


def _scanned(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> tuple[str, int]:
    """The operand of a scan, in the result's type, and the axis that it runs along."""
    x = graph.read(call.args[0])
    if dtype_of(call.args[0]) != dtype_of(var):
        x = cast_to(graph, x, dtype_of(var))
    if call.attrs.axis is not None:
        return x, int(call.attrs.axis) % len(shape_of(var))
    return graph.node("Reshape", [x, graph.vector([-1])]), 0


def _cumulative_sum(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    x, axis = _scanned(graph, var, call)
    return graph.node("CumSum", [x, graph.constant(np.array(axis, np.int64))], exclusive=int(call.attrs.exclusive or 0))


def _cumulative_product(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    """ONNX has none: each element times the one ``1, 2, 4, ...`` before it (Hillis and Steele's scan)."""
    value, axis = _scanned(graph, var, call)
    if call.attrs.exclusive:
        raise graph.refusal("leaves each element out of its own product")
    shape, step = shape_of(var), 1
    one = graph.scalar(1, var)
    while step < shape[axis]:
        pads = [0] * (2 * len(shape))
        pads[axis] = step
        shifted = sliced(graph, graph.node("Pad", [value, graph.vector(pads), one]), [axis], [0], [shape[axis]], [1])
        value = graph.node("Mul", [value, shifted])
        step *= 2
    return value


def _sort(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    return _top(graph, call, shape_of(var)[int(call.attrs.axis)], bool(call.attrs.descending))[0]


def _argsort(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    found = _top(graph, call, shape_of(var)[int(call.attrs.axis)], bool(call.attrs.descending))[1]
    return found if dtype_of(var) == "int64" else cast_to(graph, found, dtype_of(var))


def _top_k(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    axis, kind = int(call.attrs.axis), str(call.attrs.ret_type)
    k = int(plain(call.attrs.k) if isinstance(call.attrs.k, tirx.IntImm) else call.attrs.k)
    count = k if k > 0 else shape_of(call.args[0])[axis]
    values, found = _top(graph, call, count, bool(call.attrs.largest))
    if kind == "values":
        return values
    dtype = str(call.attrs.dtype)
    found = found if dtype == "int64" else cast_to(graph, found, dtype)
    return found if kind == "indices" else (values, found)


def _top(graph: OnnxGraph, call: relax.Call, count: int, is_largest: bool) -> tuple[str, ...]:
    inputs = [graph.read(call.args[0]), graph.vector([count])]
    return graph.nodes("TopK", inputs, 2, axis=int(call.attrs.axis), largest=int(is_largest), sorted=1)


def _einsum(graph: OnnxGraph, var: relax.Var, call: relax.Call) -> Value:
    inputs = [graph.read(part) for part in parts_of(graph, call.args[0])]
    return graph.node("Einsum", inputs, equation=str(call.attrs.subscripts))


OPERATORS: dict[str, Rule] = {
    **LAYERS,
    **SHAPES,
    # Functions of one operand, by the name that ONNX has for them
    **{name.lower(): _direct(name) for name in (
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "Log",
        "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Tan", "Tanh", "IsInf", "IsNaN",
    )},
    "negative": _direct("Neg"),
    "rsqrt": _chain("Sqrt", "Reciprocal"),
    "square": _square,
    "trunc": _trunc,
    "isfinite": _is_finite,
    "nn.relu": _direct("Relu"),
    "nn.leakyrelu": _leaky_relu,
    "nn.gelu": _direct("Gelu"),
    "nn.gelu_tanh": _direct("Gelu", approximate="tanh"),
    "nn.silu": _silu,
    "clip": _clip,
    "astype": _cast,
    # Of two or three operands
    "add": _direct("Add"),
    "subtract": _direct("Sub"),
    "multiply": _direct("Mul"),
    "divide": _direct("Div"),
    "power": _direct("Pow"),
    "maximum": _direct("Max"),
    "minimum": _direct("Min"),
    "mod": _direct("Mod", fmod=1),
    "floor_mod": _remainder,
    "floor_divide": _floor_divide,
    "atan2": _atan2,
    "where": _direct("Where"),
    "equal": _compare("Equal"),
    "not_equal": _compare("Equal", "Not"),
    "less": _compare("Less"),
    "less_equal": _compare("LessOrEqual"),
    "greater": _compare("Greater"),
    "greater_equal": _compare("GreaterOrEqual"),
    "logical_and": _direct("And"),
    "logical_or": _direct("Or"),
    "logical_xor": _direct("Xor"),
    "logical_not": _direct("Not"),
    "bitwise_and": _bitwise("BitwiseAnd", "And"),
    "bitwise_or": _bitwise("BitwiseOr", "Or"),
    "bitwise_xor": _bitwise("BitwiseXor", "Xor"),
    "bitwise_not": _bitwise("BitwiseNot", "Not"),
    "matmul": _direct("MatMul"),
    "einsum": _einsum,
    # Along axes
    "nn.softmax": along_axis("Softmax"),
    "nn.log_softmax": along_axis("LogSoftmax"),
    "sum": _reduce("ReduceSum"),
    "mean": _reduce("ReduceMean"),
    "max": _reduce("ReduceMax"),
    "min": _reduce("ReduceMin"),
    "prod": _reduce("ReduceProd"),
    "variance": _variance(),
    "std": _variance("Sqrt"),
    "call_tir": _called,
    "argmax": _arg_extreme("ArgMax"),
    "argmin": _arg_extreme("ArgMin"),
    "cumsum": _cumulative_sum,
    "cumprod": _cumulative_product,
    "sort": _sort,
    "argsort": _argsort,
    "topk": _top_k,
}  # fmt: skip
