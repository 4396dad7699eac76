"""Compute what is already known: static types of all values, shape arithmetic, constants made of constants.

One pass over the nodes in order. Weights (float and 8-bit arrays that the file holds) are left alone, so that
they reach the module under their own names; what is folded is what exporters write around them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from pumice.errors import ModelError, UnsupportedError
from pumice.frontend.onnx_file import read_sparse_tensor, read_tensor
from pumice.frontend.onnx_graph import Graph, TensorType, attributes_of, operand, quote
from pumice.frontend.onnx_operators import EXPANDED

_FOLD_LIMIT = 2**22  # elements of a folded result: a 2048 x 2048 attention mask
_SHAPE_DATA_LIMIT = 1024  # elements of a constant that shape inference gets to see
_ELEMENT_LIMIT = 2**33
_NOT_FOLDED = {
    "QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "DynamicQuantizeLinear", "If", "Loop", "Scan", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike", "Bernoulli", "Multinomial",
}  # fmt: skip


def fold_constants(graph: Graph) -> Graph:
    """``y = Reshape(x, Concat(Gather(Shape(x), 0), [-1]))  ->  y = Reshape(x, [1, -1])``; Identity and Dropout go.

    Afterwards ``graph.types`` holds every value. Raises ModelError where shapes do not fit together,
    UnsupportedError where an extent depends on the data.
    """
    graph.types = dict(graph.inputs) | {name: TensorType.of(value) for name, value in graph.constants.items()}
    aliases: dict[str, str] = {}
    kept = []
    waiting = graph.nodes[::-1]
    while waiting:
        node = waiting.pop()
        for position, name in enumerate(node.input):
            node.input[position] = aliases.get(name, name)
        if node.op_type == "Constant":
            _add_constant_node(graph, node)
        elif _is_identity(graph, node):
            if node.output[0] in graph.outputs:  # a graph output keeps its name, and so a node of its own
                kept.append(helper.make_node("Identity", node.input[:1], node.output[:1], name=node.name))
                graph.types[node.output[0]] = graph.types[node.input[0]]
            else:
                aliases[node.output[0]] = node.input[0]
        elif node.op_type in EXPANDED:
            waiting += _expand(graph, node)[::-1]
        elif not _fold(graph, node):
            kept.append(node)
    graph.nodes = kept
    graph.prune()
    return graph


def _add_constant_node(graph: Graph, node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name == "value":
            value = read_tensor(attribute.t, graph.source, None)
        elif attribute.name == "sparse_value":
            value = read_sparse_tensor(attribute.sparse_tensor, graph.source, None)
        elif attribute.name in {"value_float", "value_floats"}:
            value = np.asarray(helper.get_attribute_value(attribute), np.float32)
        elif attribute.name in {"value_int", "value_ints"}:
            value = np.asarray(helper.get_attribute_value(attribute), np.int64)
        else:
            raise UnsupportedError(f"The {graph.where(node)} holds strings, which cannot be compiled.")
        graph.constants[node.output[0]] = value
        graph.types[node.output[0]] = TensorType.of(value)
        return
    raise ModelError(f"The {graph.where(node)} holds no value; the file is damaged.")


def _expand(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes by which the standard defines an operator."""
    model = _single_node_model(graph, node)
    try:
        expanded = inliner.inline_selected_functions(model, [("", node.op_type)], inline_schema_functions=True)
    except Exception as error:
        raise UnsupportedError(f"The {graph.where(node)} cannot be expanded: {str(error)[:200]}.") from error
    if any(inner.op_type == node.op_type for inner in expanded.graph.node):
        raise UnsupportedError(f"The {graph.where(node)} is not supported: version {graph.opset} does not define it.")
    outside = {*node.input, *node.output, ""}
    for inner in expanded.graph.node:
        inner.name = node.name or node.output[0]
        for names in (inner.input, inner.output):
            for position, name in enumerate(names):
                names[position] = name if name in outside else f"{node.output[0]}/{name}"
    return list(expanded.graph.node)


def _is_identity(graph: Graph, node: onnx.NodeProto) -> bool:
    """Identity, a Cast to the same type, and Dropout at inference (refused elsewhere when it is told to train)."""
    if node.op_type == "Identity":
        return True
    if node.op_type in {"Cast", "CastLike"}:
        return infer_types(graph, node)[node.output[0]] == graph.types[node.input[0]]
    if node.op_type != "Dropout" or len([name for name in node.output if name]) > 1:
        return False
    training = operand(node, 2)
    return not training or (training in graph.constants and not graph.constants[training].any())


def _fold(graph: Graph, node: onnx.NodeProto) -> bool:
    """Note the node's result types; True when its results are constants now."""
    if node.op_type in {"Shape", "Size"}:
        shape = np.array(graph.types[node.input[0]].shape, np.int64)
        attributes = attributes_of(node)
        sliced = shape[attributes.get("start", 0) : attributes.get("end")]
        _add_result(graph, node.output[0], sliced if node.op_type == "Shape" else np.array(shape.prod()))
        return True
    types = infer_types(graph, node)
    graph.types.update(types)
    if node.op_type in _NOT_FOLDED or not all(name in graph.constants for name in node.input if name):
        return False
    if any(_is_weight(graph, name) for name in node.input if name):
        return False
    if sum(math.prod(result.shape) for result in types.values()) > _FOLD_LIMIT:
        return False
    for name, value in zip(node.output, _evaluate(graph, node), strict=False):
        if name:
            _add_result(graph, name, np.asarray(value))
    return True


def _is_weight(graph: Graph, name: str) -> bool:
    value = graph.constants[name]
    from_file = name not in graph.derived
    return from_file and value.ndim > 0 and value.size > 1 and value.dtype.name in {"float32", "int8", "uint8"}


def _add_result(graph: Graph, name: str, value: np.ndarray) -> None:
    graph.constants[name] = value
    graph.types[name] = TensorType.of(value)
    graph.derived.add(name)


def infer_types(graph: Graph, node: onnx.NodeProto) -> dict[str, TensorType]:
    """The static types of a node's results, by ONNX's own shape inference."""
    place = f"The {graph.where(node)}"
    try:
        schema = onnx.defs.get_schema(node.op_type, graph.opset, "")
    except onnx.defs.SchemaError as error:
        raise UnsupportedError(f"{place} is no standard operator of version {graph.opset}.") from error
    reads = [name for name in node.input if name]
    data = {
        name: numpy_helper.from_array(graph.constants[name], name)
        for name in reads
        if name in graph.constants and graph.constants[name].size <= _SHAPE_DATA_LIMIT
    }
    try:
        inferred = shape_inference.infer_node_outputs(
            schema,
            node,
            {name: graph.types[name].to_proto() for name in reads},
            data,
            opset_imports=[helper.make_opsetid("", graph.opset)],
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"{place} does not fit its operands: {reason}.") from error
    if node.op_type == "GroupNormalization":  # ONNX has no inference for it
        return {node.output[0]: graph.types[node.input[0]]}
    return {name: _static_type(place, name, inferred.get(name)) for name in node.output if name}


def _static_type(place: str, name: str, proto: onnx.TypeProto | None) -> TensorType:
    if proto is None or not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
        raise UnsupportedError(f"{place} makes {quote(name)}, whose shape is not known before it runs.")
    dims = proto.tensor_type.shape.dim
    if not all(dim.HasField("dim_value") for dim in dims):
        raise UnsupportedError(f"{place} makes {quote(name)}, whose shape depends on the values that it reads.")
    shape = tuple(int(dim.dim_value) for dim in dims)
    if any(extent < 0 for extent in shape) or math.prod(shape) > _ELEMENT_LIMIT:
        raise ModelError(f"{place} makes {quote(name)} of the impossible shape {list(shape)[:8]}.")
    return TensorType(np.dtype(helper.tensor_dtype_to_np_dtype(proto.tensor_type.elem_type)).name, shape)


def _evaluate(graph: Graph, node: onnx.NodeProto) -> list[Any]:
    """The node's results by ONNX's reference implementation."""
    reads = sorted({name for name in node.input if name})
    model = _single_node_model(graph, node)
    try:
        results = ReferenceEvaluator(model).run(None, {name: graph.constants[name] for name in reads})
    except Exception as error:
        raise ModelError(f"The {graph.where(node)} cannot be computed: {str(error)[:200]}.") from error
    values = iter(results)
    return [next(values) if name else None for name in node.output]


def _single_node_model(graph: Graph, node: onnx.NodeProto) -> onnx.ModelProto:
    reads = sorted({name for name in node.input if name})
    body = helper.make_graph(
        [node],
        "node",
        [helper.make_value_info(name, graph.types[name].to_proto()) for name in reads],
        [helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", graph.opset)])
