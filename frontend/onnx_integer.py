"""Integer operators rewritten to quantize / dequantize around the float operator (QDQ), scales untouched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from pumice.errors import ModelError, UnsupportedError
from pumice.frontend.onnx_graph import Graph, TensorType, attributes_of, operand

_EXACT_INTEGERS = 2**24  # a float32 sum holds every integer up to here


def rewrite_integer_operators(graph: Graph) -> Graph:
    """``QLinearConv(x, w, b)  ->  Quantize(Conv(Dequantize(x), Dequantize(w), b * x_scale * w_scale))``, and the like.

    QLinearConv, QLinearMatMul, ConvInteger, MatMulInteger. Raises UnsupportedError where the float form
    would not give the same integers.
    """
    rewritten = []
    for node in graph.nodes:
        rewrite = _REWRITES.get(node.op_type)
        rewritten += rewrite(graph, node) if rewrite else [node]
    graph.nodes = rewritten
    return graph


def _qlinear_conv(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = node.input[:8]
    bias = operand(node, 8)
    operands = [_dequantize(graph, node, x, x_scale, x_zero, 1), _dequantize(graph, node, w, w_scale, w_zero, 0)]
    reads = [made.output[0] for made in operands]
    if bias:
        reads.append(_float_bias(graph, node, bias, x_scale, w_scale))
    return [*operands, *_requantized(graph, node, "Conv", reads, y_scale, y_zero)]


def _qlinear_matmul(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.input[:8]
    operands = [
        _dequantize(graph, node, a, a_scale, a_zero, len(graph.types[a].shape) - 2),
        _dequantize(graph, node, b, b_scale, b_zero, len(graph.types[b].shape) - 1),
    ]
    return [*operands, *_requantized(graph, node, "MatMul", [made.output[0] for made in operands], y_scale, y_zero)]


def _conv_integer(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    terms = int(np.prod(graph.types[node.input[1]].shape[1:]))
    return _integer_product(graph, node, "Conv", terms, 1, 0)


def _matmul_integer(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    left, right = graph.types[node.input[0]].shape, graph.types[node.input[1]].shape
    return _integer_product(graph, node, "MatMul", left[-1], len(left) - 2, len(right) - 1)


def _integer_product(
    graph: Graph, node: onnx.NodeProto, product: str, terms: int, left_axis: int, right_axis: int
) -> list[onnx.NodeProto]:
    """``MatMulInteger(a, b)  ->  Cast(MatMul(Dequantize(a, 1), Dequantize(b, 1)))``, where float32 sums are exact."""
    if terms * 255 * 255 >= _EXACT_INTEGERS and not _read_as_float(graph, node.output[0]):
        raise UnsupportedError(
            f"The {graph.where(node)} is not supported: its sums of {terms} products are read as integers, "
            "and float32 does not hold them exactly."
        )
    one = graph.add_constant(f"{node.output[0]}.scale", np.array(1, np.float32))
    operands = [
        _dequantize(graph, node, node.input[0], one, operand(node, 2), left_axis),
        _dequantize(graph, node, node.input[1], one, operand(node, 3), right_axis),
    ]
    made = _float_node(graph, node, product, [dequantized.output[0] for dequantized in operands])
    cast = helper.make_node("Cast", [made.output[0]], [node.output[0]], name=f"{node.name}/cast", to=TensorProto.INT32)
    return [*operands, made, cast]


def _read_as_float(graph: Graph, name: str) -> bool:
    """Whether every reader turns the integers into float32 at once, as exporters of dynamic quantization do."""
    readers = graph.consumers().get(name, [])
    floats = all(reader.op_type == "Cast" and attributes_of(reader)["to"] == TensorProto.FLOAT for reader, _ in readers)
    return floats and name not in graph.outputs


def _dequantize(graph: Graph, node: onnx.NodeProto, value: str, scale: str, zero: str, axis: int) -> onnx.NodeProto:
    name = _fresh(graph, f"{node.output[0]}.{value}", TensorType("float32", graph.types[value].shape))
    reads = [value, scale, zero] if zero else [value, scale]
    return helper.make_node("DequantizeLinear", reads, [name], name=node.name or node.output[0], axis=axis)


def _requantized(
    graph: Graph, node: onnx.NodeProto, product: str, reads: list[str], scale: str, zero: str
) -> list[onnx.NodeProto]:
    made = _float_node(graph, node, product, reads)
    label = node.name or node.output[0]
    return [made, helper.make_node("QuantizeLinear", [made.output[0], scale, zero], [node.output[0]], name=label)]


def _float_node(graph: Graph, node: onnx.NodeProto, product: str, reads: list[str]) -> onnx.NodeProto:
    result = _fresh(graph, f"{node.output[0]}.float", TensorType("float32", graph.types[node.output[0]].shape))
    made = helper.make_node(product, reads, [result], name=node.name or node.output[0])
    made.attribute.extend(node.attribute)
    return made


def _float_bias(graph: Graph, node: onnx.NodeProto, bias: str, x_scale: str, w_scale: str) -> str:
    """The int32 bias in float32, under its own name: ``b * x_scale * w_scale``."""
    if not {bias, x_scale, w_scale} <= set(graph.constants):
        raise UnsupportedError(f"The {graph.where(node)} is not supported: its bias or scales are computed.")
    values = graph.constants[bias]
    if values.dtype != np.int32:
        raise ModelError(f"The {graph.where(node)} has a bias of {values.dtype}; ONNX asks for int32.")
    scale = graph.constants[x_scale].astype(np.float64) * graph.constants[w_scale].astype(np.float64)
    shared = len(graph.consumers()[bias]) > 1
    return set_constant(graph, bias, (values * scale).astype(np.float32), fresh=shared)


def set_constant(graph: Graph, name: str, value: np.ndarray, fresh: bool) -> str:
    """Replace a constant, or where others read it as it is (``fresh``), add the new value beside it."""
    if fresh:
        return graph.add_constant(f"{name}.{value.dtype.name}", value)
    graph.constants[name] = value
    graph.types[name] = TensorType.of(value)
    return name


def _fresh(graph: Graph, name: str, type_: TensorType) -> str:
    unique, count = name, 0
    while unique in graph.types:
        count += 1
        unique = f"{name}_{count}"
    graph.types[unique] = type_
    return unique


_REWRITES: dict[str, Callable[[Graph, onnx.NodeProto], list[onnx.NodeProto]]] = {
    "ConvInteger": _conv_integer,
    "MatMulInteger": _matmul_integer,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
}
