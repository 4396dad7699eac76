"""Quantize and dequantize nodes, checked and brought to one form: weights int8 with zero point 0, biases float32."""

from __future__ import annotations

import numpy as np
import onnx

from pumice.errors import ModelError, UnsupportedError
from pumice.frontend.onnx_graph import Graph, TensorType, attributes_of, operand, set_attributes
from pumice.frontend.onnx_integer import set_constant

_QUANTIZED = {"int8", "uint8"}
# Which axis of a weight holds the output channels.
_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": -1}


def normalize_quantization(graph: Graph) -> Graph:
    """Every QuantizeLinear and DequantizeLinear in Pumice's form, numbers unchanged.

    - a weight: int8, zero point 0, scale ``<weight>.scale`` float32 [N] over the output channels; uint8 weights
      move by 128; a weight quantized in the graph (quantization-aware training) is quantized here; one with
      another zero point becomes the float32 that it stands for;
    - an int32 bias becomes the float32 that it stands for;
    - an activation: scalar scale and zero point.

    Raises ModelError for a scale that is not a positive normal number or does not fit its axis,
    UnsupportedError for scales that are computed, for blocks, and for other element types than int8 and uint8.
    """
    kept = []
    aliases: dict[str, str] = {}
    for node in graph.nodes:
        for position, name in enumerate(node.input):
            node.input[position] = aliases.get(name, name)
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            _check(graph, node)
            constant = _fold_quantize(graph, node) if node.op_type == "QuantizeLinear" else _fold_weight(graph, node)
            if constant:
                aliases[node.output[0]] = constant
                continue
        kept.append(node)
    graph.nodes = kept
    graph.prune()
    return graph


def _check(graph: Graph, node: onnx.NodeProto) -> None:
    """Refuse what is damaged or unsupported; make the zero point and the axis explicit."""
    place = f"The {graph.where(node)}"
    scale_name, zero_name = node.input[1], operand(node, 2)
    values = attributes_of(node)
    if scale_name not in graph.constants or (zero_name and zero_name not in graph.constants):
        raise UnsupportedError(f"{place} is not supported: its scale or zero point is computed while running.")
    scale = graph.constants[scale_name]
    if values.get("block_size", 0) or scale.ndim > 1:
        raise UnsupportedError(f"{place} is not supported: it has one scale for each block, not for each channel.")
    _check_types(graph, node, place)
    if not (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all():
        raise ModelError(f"{place} has a scale that is not a positive normal number; quantize the model again.")
    zero = graph.constants[zero_name] if zero_name else np.zeros(scale.shape, _quantized_dtype(graph, node))
    if zero.size != scale.size:
        raise ModelError(f"{place} has {scale.size} scales and {zero.size} zero points.")
    shape = graph.types[node.input[0]].shape
    axis = values.get("axis", 1)
    if scale.size == 1:
        scale, zero, axis = scale.reshape(()), zero.reshape(()), 0
    elif not -len(shape) <= axis < len(shape):
        raise ModelError(f"{place} has the axis {axis}, outside of the {len(shape)} axes of its operand.")
    elif shape[axis] != scale.size:
        raise ModelError(f"{place} has {scale.size} scales for the {shape[axis]} channels of its axis {axis}.")
    axis = axis % len(shape) if shape else 0
    set_attributes(node, axis=axis, block_size=None, saturate=None, output_dtype=None, precision=None)
    scale_name = graph.add_constant(f"{node.output[0]}.scale", scale)
    node.input[1:] = [scale_name, graph.add_constant(f"{node.output[0]}.zero_point", zero)]


def _check_types(graph: Graph, node: onnx.NodeProto, place: str) -> None:
    dtype = _quantized_dtype(graph, node)
    bias = node.op_type == "DequantizeLinear" and dtype == "int32" and node.input[0] in graph.constants
    if dtype not in _QUANTIZED and not bias:
        raise UnsupportedError(f"{place} is not supported: it quantizes to {dtype}, and int8 and uint8 are supported.")
    scale = graph.types[node.input[1]].dtype
    real = graph.types[node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]].dtype
    if {scale, real} != {"float32"}:
        raise UnsupportedError(f"{place} is not supported: it quantizes {real} by {scale}, not float32 by float32.")
    zero = operand(node, 2)
    if zero and graph.types[zero].dtype != dtype:
        raise ModelError(f"{place} quantizes to {dtype} with a zero point of {graph.types[zero].dtype}.")


def _quantized_dtype(graph: Graph, node: onnx.NodeProto) -> str:
    return graph.types[node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]].dtype


def _fold_quantize(graph: Graph, node: onnx.NodeProto) -> str:
    """A float weight quantized in the graph: its int8 values, under its name; '' for an activation."""
    name = node.input[0]
    if name not in graph.constants:
        return ""
    value, scale, zero = (graph.constants[read] for read in node.input[:3])
    axis = attributes_of(node)["axis"]
    limits = np.iinfo(zero.dtype)
    steps = np.rint(value / _along(scale, axis, value.ndim)) + _along(zero, axis, value.ndim).astype(np.float32)
    quantized = np.clip(steps, limits.min, limits.max).astype(zero.dtype)
    return set_constant(graph, name, quantized, fresh=len(graph.consumers()[name]) > 1)


def _fold_weight(graph: Graph, node: onnx.NodeProto) -> str:
    """Bring a dequantized constant to its form; the name of a float32 constant when it need not stay int8."""
    name = node.input[0]
    if name not in graph.constants:
        return ""
    value, scale, zero = (graph.constants[read] for read in node.input[:3])
    axis = attributes_of(node)["axis"]
    fresh = len(graph.consumers()[name]) > 1
    if value.dtype == np.uint8:
        value, zero = (value.astype(np.int16) - 128).astype(np.int8), (zero.astype(np.int16) - 128).astype(np.int8)
    if value.dtype == np.int32 or value.ndim < 2 or zero.any():
        difference = value.astype(np.int64) - _along(zero, axis, value.ndim).astype(np.int64)
        real = difference.astype(np.float32) * _along(scale, axis, value.ndim)
        return set_constant(graph, name, real, fresh)
    if value is not graph.constants[name]:
        node.input[0] = set_constant(graph, name, value, fresh)
    if scale.ndim == 0:
        axis = _channel_axis(graph, node, value.ndim)
        scale = np.full(value.shape[axis], scale, np.float32)
    scale_name = graph.add_constant(f"{name}.scale", scale)
    node.input[1:] = [scale_name, graph.add_constant(f"{name}.zero_point", np.array(0, np.int8))]
    set_attributes(node, axis=axis)
    graph.types[node.output[0]] = TensorType("float32", value.shape)
    return ""


def _channel_axis(graph: Graph, node: onnx.NodeProto, rank: int) -> int:
    for reader, position in graph.consumers().get(node.output[0], []):
        if position == 1 and reader.op_type in _CHANNEL_AXIS:
            turned = reader.op_type == "Gemm" and attributes_of(reader).get("transB", 0)
            return 0 if turned else _CHANNEL_AXIS[reader.op_type] % rank
    return 0


def _along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Per-channel values shaped to broadcast along ``axis``."""
    return values.reshape([-1 if i == axis else 1 for i in range(rank)]) if values.ndim else values
